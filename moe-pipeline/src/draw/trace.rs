//! A timeline as a trace.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::ops::Range;

use super::kept;
use crate::{Span, Timeline, Trip};

impl Timeline {
    /// A trace in Chrome's JSON format, for Perfetto (ui.perfetto.dev) and `chrome://tracing`: a lane per rank, how many
    /// activations each rank keeps, and, as a process of its own, a lane per link with the messages that occupy it. One unit of cost
    /// is shown as a microsecond.
    pub fn chrome_trace(&self) -> String {
        let mut trace = String::from("{\"traceEvents\":[\n");
        for (rank, spans) in self.spans.iter().enumerate() {
            lane(&mut trace, 0, rank, &format!("rank {rank}"));
            for &Span { action, start, end } in spans {
                event(&mut trace, (0, rank), &action.to_string(), action.kind.name(), start..end);
            }
            for (at, kept) in kept(spans) {
                let _ = writeln!(
                    trace,
                    "{{\"name\":\"activations of rank {rank}\",\"ph\":\"C\",\"pid\":0,\"ts\":{at},\"args\":{{\"kept\":{kept}}}}},"
                );
            }
        }
        let mut links: BTreeMap<(u32, u32), Vec<&Trip>> = BTreeMap::new();
        for trip in &self.trips {
            links.entry((trip.from, trip.to)).or_default().push(trip);
        }
        for (tid, ((from, to), trips)) in links.into_iter().enumerate() {
            lane(&mut trace, 1, tid, &format!("rank {from} to rank {to}"));
            for trip in trips {
                event(&mut trace, (1, tid), &trip.message.to_string(), "message", trip.start..trip.sent);
            }
        }
        let _ = write!(
            trace,
            "{{\"name\":\"process_name\",\"ph\":\"M\",\"pid\":1,\"args\":{{\"name\":\"links\"}}}},\n\
             {{\"name\":\"process_name\",\"ph\":\"M\",\"pid\":0,\"args\":{{\"name\":\"pipeline\"}}}}\n]}}\n"
        );
        trace
    }
}

/// Names a lane of a process.
fn lane(trace: &mut String, pid: usize, tid: usize, name: &str) {
    let _ = writeln!(
        trace,
        "{{\"name\":\"thread_name\",\"ph\":\"M\",\"pid\":{pid},\"tid\":{tid},\"args\":{{\"name\":\"{name}\"}}}},"
    );
}

/// Something that takes time in a lane.
fn event(trace: &mut String, (pid, tid): (usize, usize), name: &str, category: &str, time: Range<f64>) {
    let _ = writeln!(
        trace,
        "{{\"name\":\"{name}\",\"cat\":\"{category}\",\"ph\":\"X\",\"pid\":{pid},\"tid\":{tid},\"ts\":{},\"dur\":{}}},",
        time.start,
        time.end - time.start
    );
}
