//! Orders of compute and of messages against torch's (`fixtures/make_torch.py`).

mod common;

use moe_pipeline::generate::{Named, Sizes, one_f_one_b};
use moe_pipeline::{Action, Error, Kind, Pass, Schedule, add_send_recv, add_waits, validate};

/// FNV-1a.
fn digest(text: &str) -> String {
    let step = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3);
    format!("{:016x}", text.bytes().fold(0xCBF2_9CE4_8422_2325, step))
}

/// Torch's breadth-first takes the last micro-batch of a stage backward first.
fn descending(schedule: &Schedule) -> Schedule {
    let flip = |action: Action| match action.kind {
        Kind::Backward => Action { microbatch: schedule.microbatches() - 1 - action.microbatch, ..action },
        _ => action,
    };
    let lists =
        common::lists(schedule).into_iter().map(|list| list.into_iter().map(flip).collect()).collect();
    Schedule::new(schedule.placement().clone(), schedule.microbatches(), Pass::ForwardBackward, lists)
        .unwrap()
}

/// Every schedule that both have, by torch's name, at 522 sizes. Two are not the same at 128 of them: breadth-first as told above,
/// and interleaved 1F1B with one stage per rank, where torch goes as far ahead as with several and keeps more for nothing; ours is
/// 1F1B.
#[test]
fn compute_and_messages_are_torchs_at_every_size() {
    let (mut seen, mut equal, mut names) = (0, 0, Vec::new());
    for line in include_str!("fixtures/torch_digests.txt").lines().skip(1) {
        let fields: Vec<&str> = line.split(' ').collect();
        let &[name, p, v, m, compute, messages] = fields.as_slice() else { panic!("{line}") };
        let [p, v, m] = [p, v, m].map(|number| number.parse().unwrap());
        let named: Named = name.parse().unwrap();
        let sizes = Sizes { ranks: p, virtual_stages: v, microbatches: m, group: None };
        let mut schedule = named.generate(sizes).unwrap();
        let mut same = digest(&schedule.to_string()) == compute;
        equal += u32::from(same);
        if name == "LoopedBFS" {
            assert_eq!(same, m == 1, "{line}");
            schedule = descending(&schedule);
            same = digest(&schedule.to_string()) == compute;
        }
        if name == "Interleaved1F1B" && v == 1 {
            assert_eq!(schedule, one_f_one_b(p, m).unwrap());
            // Both are the same where the last rank but one goes ahead of all its backward passes.
            assert_eq!(same, p == 1 || m <= 2, "{line}");
        } else {
            assert!(same, "{line}");
            let with_messages = add_send_recv(&schedule.serial().unwrap()).unwrap();
            assert_eq!(digest(&with_messages.to_string()), messages, "{line}");
        }
        seen += 1;
        names.push(named);
    }
    assert_eq!((seen, equal), (522, 522 - 128));
    let torchs = |named: &&Named| named.torch_name().is_some();
    assert!(Named::ALL.iter().filter(torchs).all(|named| names.contains(named)));
}

/// The same on the text itself, for small sizes; and torch's text is read, lowered, validated and run.
#[test]
fn torchs_text_is_read_written_lowered_and_run() {
    let mut seen = 0;
    for entry in include_str!("fixtures/torch_orders.txt").split("schedule ").skip(1) {
        let (name, rest) = entry.split_once('\n').unwrap();
        let (compute, expected) = rest.strip_prefix("compute\n").unwrap().split_once("comms\n").unwrap();
        let schedule: Schedule = compute.parse().unwrap();
        assert_eq!(schedule.to_string(), compute, "{name}");
        let with_messages = add_send_recv(&schedule.serial().unwrap()).unwrap();
        assert_eq!(with_messages.to_string(), expected, "{name}");
        assert_eq!(expected.parse::<Schedule>().unwrap(), with_messages, "{name}");
        for lowered in [with_messages, add_send_recv(&schedule).unwrap()] {
            // Torch's breadth-first order accumulates in descending order.
            match (name.starts_with("LoopedBFS"), validate(add_waits(&lowered).unwrap(), None)) {
                (true, Err(Error::OutOfOrder { .. })) => {}
                (false, Ok(program)) => common::equals_sequential(&program),
                (_, other) => panic!("{name}: {other:?}"),
            }
        }
        seen += 1;
    }
    assert_eq!(seen, 57);
}
