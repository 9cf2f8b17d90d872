//! A timeline in a terminal.

use crate::{Kind, Timeline};

impl Timeline {
    /// One line per rank, time from left to right over `columns` characters. A block begins with its micro-batch and
    /// goes on with `-` for `F`, `=` for `B` and `I`, `~` for `W`, `#` for an overlap (of whose `F` the number is); dots are
    /// idle.
    pub fn draw(&self, columns: u16) -> String {
        let columns = usize::from(columns);
        let scale = if self.makespan > 0.0 { columns as f64 / self.makespan } else { 0.0 };
        let column = |time: f64| ((time * scale).round() as usize).min(columns);
        let digits = self.spans.len().saturating_sub(1).to_string().len();
        let mut picture = String::new();
        for (rank, spans) in self.spans.iter().enumerate() {
            let mut line = vec!['.'; columns];
            for span in spans {
                let fill = match span.action.kind {
                    Kind::Forward => '-',
                    Kind::BackwardWeight => '~',
                    Kind::Overlap { .. } => '#',
                    _ => '=',
                };
                let end = column(span.end);
                let block = &mut line[column(span.start).min(end)..end];
                let label = span.action.microbatch.to_string();
                for (cell, c) in block.iter_mut().zip(label.chars().chain(std::iter::repeat(fill))) {
                    *cell = c;
                }
            }
            picture.extend(format!("rank {rank:digits$} ").chars().chain(line).chain(['\n']));
        }
        picture
    }
}
