//! A timeline as a trace.

use std::fmt::Write;

use crate::{Kind, Timeline};

impl Timeline {
    /// A trace in Chrome's JSON format, for Perfetto (ui.perfetto.dev) and `chrome://tracing`: one lane per rank, and how many
    /// activations each rank keeps. One unit of cost is shown as a microsecond.
    pub fn chrome_trace(&self) -> String {
        let mut trace = String::from("{\"traceEvents\":[\n");
        for (rank, spans) in self.spans.iter().enumerate() {
            let _ = writeln!(
                trace,
                "{{\"name\":\"thread_name\",\"ph\":\"M\",\"pid\":0,\"tid\":{rank},\"args\":{{\"name\":\"rank {rank}\"}}}},"
            );
            let mut kept: i64 = 0;
            for span in spans {
                let (action, start, end) = (span.action, span.start, span.end);
                let _ = writeln!(
                    trace,
                    "{{\"name\":\"{action}\",\"cat\":\"{}\",\"ph\":\"X\",\"pid\":0,\"tid\":{rank},\"ts\":{start},\"dur\":{}}},",
                    action.kind.name(),
                    end - start
                );
                let before = kept;
                for part in action.parts() {
                    match part.kind {
                        Kind::Forward => kept += 1,
                        Kind::Backward | Kind::BackwardWeight => kept -= 1,
                        _ => {}
                    }
                }
                if kept != before {
                    let _ = writeln!(
                        trace,
                        "{{\"name\":\"activations of rank {rank}\",\"ph\":\"C\",\"pid\":0,\"ts\":{end},\
                         \"args\":{{\"kept\":{kept}}}}},"
                    );
                }
            }
        }
        let _ = write!(
            trace,
            "{{\"name\":\"process_name\",\"ph\":\"M\",\"pid\":0,\"args\":{{\"name\":\"pipeline\"}}}}\n]}}\n"
        );
        trace
    }
}
