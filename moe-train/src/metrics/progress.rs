//! The line that a person watches.

use std::io::{self, Write};

use super::StepRecord;

/// Shows how a run goes: on a terminal one line that is rewritten, elsewhere a line every few steps.
#[derive(Debug)]
pub struct Progress<W: Write> {
    out: W,
    terminal: bool,
    steps: u64,
    tokens: u64,
    log_interval: u64,
    /// Running mean of a token's seconds.
    token_seconds: Option<f64>,
    /// Whether the cursor stands after a line that is to be rewritten.
    live: bool,
}

impl<W: Write> Progress<W> {
    /// For a run of `steps` steps and `tokens` tokens in all; `terminal` says whether `out` is one. Elsewhere every
    /// `log_interval`-th step gets a line, and so do the first and the last.
    pub fn new(out: W, terminal: bool, steps: u64, tokens: u64, log_interval: u64) -> Self {
        let log_interval = log_interval.max(1);
        Progress { out, terminal, steps, tokens, log_interval, token_seconds: None, live: false }
    }

    /// A step is done.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn step(&mut self, record: &StepRecord) -> io::Result<()> {
        let seconds = record.tokens_per_second.recip();
        let mean = self.token_seconds.map_or(seconds, |mean| 0.9 * mean + 0.1 * seconds);
        self.token_seconds = Some(mean);
        let line = self.line(record, mean);
        if self.terminal {
            // Back to the start of the line, and clear what is longer.
            write!(self.out, "\r{line}\x1b[K")?;
            self.live = true;
            return self.out.flush();
        }
        let step = record.step;
        match step == 1 || step == self.steps || step.is_multiple_of(self.log_interval) {
            true => writeln!(self.out, "{line}"),
            false => Ok(()),
        }
    }

    /// A line that stays, such as the result of an evaluation.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn note(&mut self, text: &str) -> io::Result<()> {
        self.end()?;
        writeln!(self.out, "{text}")?;
        self.out.flush()
    }

    /// Leaves the live line as it is and goes to the next.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn end(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.live) {
            writeln!(self.out)?;
        }
        self.out.flush()
    }

    fn line(&self, record: &StepRecord, token_seconds: f64) -> String {
        let number =
            |value: Option<f64>, digits| value.map_or("-".to_owned(), |value| format!("{value:.digits$}"));
        let width = self.steps.to_string().len();
        let mut line = format!(
            "step {:>width$}/{}  loss {}  grad norm {}  {} tokens/s",
            record.step,
            self.steps,
            number(record.loss, 4),
            number(record.grad_norm, 3),
            short(record.tokens_per_second),
        );
        if let Some(mfu) = record.mfu {
            line += &format!("  MFU {:.1}%", 100.0 * mfu);
        }
        if let Some((low, high)) = record.load_spread() {
            line += &format!("  expert load {low:.2}-{high:.2}x");
        }
        let left = self.tokens.saturating_sub(record.tokens);
        line + &format!("  ETA {}", duration(left as f64 * token_seconds))
    }
}

/// Three or four digits: `950`, `12.3k`, `4.56M`.
pub(crate) fn short(value: f64) -> String {
    match value {
        v if v < 1e3 => format!("{v:.0}"),
        v if v < 1e5 => format!("{:.1}k", v / 1e3),
        v if v < 1e6 => format!("{:.0}k", v / 1e3),
        v => format!("{:.2}M", v / 1e6),
    }
}

/// `42s`, `3m05s`, `2h07m`, `3d04h`.
pub(crate) fn duration(seconds: f64) -> String {
    if !seconds.is_finite() {
        return "-".to_owned();
    }
    let s = seconds.round() as u64;
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m{:02}s", s / 60, s % 60),
        3600..86400 => format!("{}h{:02}m", s / 3600, s / 60 % 60),
        _ => format!("{}d{:02}h", s / 86400, s / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: u64) -> StepRecord {
        StepRecord {
            step,
            loss: Some(2.34567),
            total_loss: Some(2.4),
            grad_norm: Some(0.98765),
            lr: 1e-3,
            tokens: 2048 * step,
            blend_tokens: Vec::new(),
            tokens_per_second: 4096.0,
            tflops_per_rank: 0.25,
            mfu: None,
            peak_memory_bytes: None,
            aux_loss: 1.0,
            sequence_aux_loss: 1.0,
            global_aux_loss: 1.0,
            z_loss: 1.0,
            dropped_tokens: 0,
            reruns: 0,
            skipped_steps: 0,
            expert_load: vec![vec![0.3, 0.2, 0.25, 0.25]],
            moe_layers: Vec::new(),
        }
    }

    fn shown(terminal: bool, records: &[StepRecord]) -> String {
        let mut out = Vec::new();
        let mut progress = Progress::new(&mut out, terminal, 300, 300 * 2048, 10);
        for record in records {
            progress.step(record).unwrap();
        }
        progress.note("validation loss 1.9").unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_terminal_has_one_line_that_is_rewritten() {
        let text = shown(true, &[record(1), record(60)]);
        assert_eq!(
            text,
            "\rstep   1/300  loss 2.3457  grad norm 0.988  4.1k tokens/s  expert load 0.80-1.20x  ETA 2m30s\x1b[K\
             \rstep  60/300  loss 2.3457  grad norm 0.988  4.1k tokens/s  expert load 0.80-1.20x  ETA 2m00s\x1b[K\
             \nvalidation loss 1.9\n"
        );
    }

    #[test]
    fn a_file_gets_some_plain_lines() {
        let records: Vec<_> = (1..=300).map(record).collect();
        let text = shown(false, &records);
        assert_eq!(text.lines().count(), 1 + 30 + 1);
        assert!(text.starts_with("step   1/300  loss"));
        assert!(!text.contains(['\r', '\x1b']));
    }

    #[test]
    fn what_is_unknown_is_a_dash() {
        let record = StepRecord {
            loss: None,
            grad_norm: None,
            tokens_per_second: 0.0,
            expert_load: vec![],
            ..record(2)
        };
        let text = shown(true, &[record]);
        assert!(text.contains("step   2/300  loss -  grad norm -  0 tokens/s  ETA -"), "{text}");
    }

    #[test]
    fn utilisation_is_shown_where_it_is_known() {
        let text = shown(true, &[StepRecord { mfu: Some(0.4567), ..record(2) }]);
        assert!(text.contains("  4.1k tokens/s  MFU 45.7%  expert load "), "{text}");
    }

    #[test]
    fn numbers_are_short() {
        for (value, text) in
            [(0.4, "0"), (950.0, "950"), (12_345.0, "12.3k"), (123_456.0, "123k"), (4.56e6, "4.56M")]
        {
            assert_eq!(short(value), text);
        }
        for (value, text) in [(59.4, "59s"), (185.0, "3m05s"), (7_620.0, "2h07m"), (273_600.0, "3d04h")] {
            assert_eq!(duration(value), text);
        }
    }
}
