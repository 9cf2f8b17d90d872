//! Tables of schedules.

use moe_pipeline::{Pass, Program, Result, Timeline};

use super::times::share;

/// What `check` says of a valid program.
pub fn checked(program: &Program) -> String {
    let schedule = program.schedule();
    let placement = schedule.placement();
    let passes = match schedule.pass() {
        Pass::ForwardBackward => "forward and backward",
        Pass::ForwardOnly => "forward",
    };
    format!(
        "valid: {} ranks, {} stages, {} micro-batches {passes}, {} actions with their messages and waits\n\
         activations of a stage kept at most, by rank: {}\n",
        placement.ranks(),
        placement.stages(),
        schedule.microbatches(),
        schedule.actions().count(),
        peaks(program)
    )
}

/// The line under a picture or a table.
pub fn summary(program: &Program, timeline: &Timeline) -> String {
    format!(
        "step {}, {:.1}% idle; activations of a stage kept at most, by rank: {}\n",
        time(timeline.makespan),
        100.0 * timeline.bubble_fraction(),
        peaks(program)
    )
}

fn peaks(program: &Program) -> String {
    program.peak_in_flight().iter().map(u32::to_string).collect::<Vec<_>>().join(" ")
}

/// A row per rank: when it computes, and why it does not.
pub fn ranks(program: &Program, timeline: &Timeline) -> String {
    let head = ["rank", "busy", "all-to-all", "activation", "gradient", "link", "send", "drain", "kept"];
    let head = head.map(str::to_owned);
    let mut rows = vec![head.to_vec()];
    let each = timeline.idle.iter().zip(program.peak_in_flight()).enumerate();
    for (rank, (idle, kept)) in each {
        let exposed = timeline.all_to_all[rank];
        let busy = timeline.makespan - idle.total() - exposed;
        let times =
            [busy, exposed, idle.activation, idle.gradient, idle.link, idle.send, idle.drain].map(time);
        rows.push([rank.to_string()].into_iter().chain(times).chain([kept.to_string()]).collect());
    }
    table(&rows)
}

/// A row per schedule, the shortest step first; then those that cannot be, with the reason. Activations count in those of all
/// layers that a rank has, so that schedules of different numbers of stages compare.
pub fn comparison(rows: impl Iterator<Item = (String, Result<(Program, Timeline)>)>) -> String {
    let mut simulated = Vec::new();
    let mut refused = String::new();
    for (name, row) in rows {
        match row {
            Ok((program, timeline)) => simulated.push((name, program, timeline)),
            Err(error) => refused += &format!("{name}: {error}\n"),
        }
    }
    simulated.sort_by(|(.., a), (.., b)| a.makespan.total_cmp(&b.makespan));
    let mut cells = vec![["schedule", "stages", "step", "idle", "activations"].map(str::to_owned).to_vec()];
    for (name, program, timeline) in simulated {
        let placement = program.schedule().placement();
        let most = program.peak_in_flight().iter().copied().max().unwrap_or(0);
        cells.push(vec![
            name,
            (placement.stages() / placement.ranks()).to_string(),
            time(timeline.makespan),
            format!("{:.1}%", 100.0 * timeline.bubble_fraction()),
            time(f64::from(most) * share(placement)),
        ]);
    }
    table(&cells) + &refused
}

/// Up to three decimals.
fn time(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Columns aligned, the first on the left, the others on the right.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width =
        |column: usize| rows.iter().filter_map(|row| row.get(column)).map(String::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cell = |(at, (text, &width)): (usize, (&String, &usize))| match at {
            0 => format!("{text:<width$}"),
            _ => format!("  {text:>width$}"),
        };
        row.iter().zip(&widths).enumerate().map(cell).collect::<String>() + "\n"
    };
    rows.iter().map(line).collect()
}
