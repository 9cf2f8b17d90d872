//! Orders: the generators', torch's, and what lowering makes of them.

mod common;

use common::{Draws, draw_schedule};
use moe_pipeline::generate::{
    Named, Sizes, breadth_first, dual_pipe, dual_pipe_v, forward_only, forward_only_over, gpipe,
    interleaved_1f1b, one_f_one_b, overlapped_1f1b, v_half, v_min, zb_h1, zb_h2, zb_v,
};
use moe_pipeline::{
    Action, Error, Flow, Kind, Message, Pass, Placement, Schedule, add_waits, lower, validate,
};
use proptest::prelude::*;

#[test]
fn one_f_one_b_is_megatrons_order() {
    let text = one_f_one_b(3, 4).unwrap().to_string();
    assert_eq!(
        text,
        "0F0,0F1,0F2,0B0,0F3,0B1,0B2,0B3\n1F0,1F1,1B0,1F2,1B1,1F3,1B2,1B3\n2F0,2B0,2F1,2B1,2F2,2B2,2F3,2B3\n"
    );
}

#[test]
fn fewer_micro_batches_than_stages() {
    assert_eq!(
        one_f_one_b(4, 2).unwrap().to_string(),
        "0F0,0F1,0B0,0B1\n1F0,1F1,1B0,1B1\n2F0,2F1,2B0,2B1\n3F0,3B0,3F1,3B1\n"
    );
    assert_eq!(one_f_one_b(2, 1).unwrap().to_string(), "0F0,0B0\n1F0,1B0\n");
}

#[test]
fn gpipe_and_forward_only() {
    assert_eq!(gpipe(2, 3).unwrap().to_string(), "0F0,0F1,0F2,0B0,0B1,0B2\n1F0,1F1,1F2,1B0,1B1,1B2\n");
    let evaluation = forward_only(2, 3).unwrap();
    assert_eq!(evaluation.to_string(), "0F0,0F1,0F2\n1F0,1F1,1F2\n");
    assert_eq!(evaluation.pass(), Pass::ForwardOnly);
}

#[test]
fn forward_only_over_any_placement() {
    let text = |placement, m| forward_only_over(&placement, m).unwrap().to_string();
    assert_eq!(
        text(Placement::looped(2, 2).unwrap(), 5),
        "0F0,0F1,2F0,2F1,0F2,0F3,2F2,2F3,0F4,2F4\n1F0,1F1,3F0,3F1,1F2,1F3,3F2,3F3,1F4,3F4\n"
    );
    assert_eq!(
        text(Placement::v_shaped(2).unwrap(), 3),
        "0F0,0F1,0F2,3F0,3F1,3F2\n1F0,2F0,1F1,2F1,1F2,2F2\n"
    );
    for p in 1..=6 {
        for m in 1..=9 {
            assert_eq!(forward_only_over(&Placement::linear(p).unwrap(), m), forward_only(p, m));
            let v_shaped = forward_only_over(&Placement::v_shaped(p).unwrap(), m).unwrap();
            validate(lower(&v_shaped).unwrap(), None).unwrap();
        }
    }
    let v_shaped = Placement::v_shaped(2).unwrap();
    assert_eq!(forward_only_over(&v_shaped, 0), Err(Error::Empty { what: "micro-batch" }));
    let copies = forward_only_over(&Placement::bidirectional(2).unwrap(), 4);
    assert!(matches!(copies, Err(Error::OtherCopy { .. })), "{copies:?}");
}

#[test]
fn breadth_first_takes_all_micro_batches_through_a_stage_before_the_next() {
    assert_eq!(
        breadth_first(2, 2, 2).unwrap().to_string(),
        "0F0,0F1,2F0,2F1,2B0,2B1,0B0,0B1\n1F0,1F1,3F0,3F1,3B0,3B1,1B0,1B1\n"
    );
    assert_eq!(breadth_first(3, 1, 4).unwrap(), gpipe(3, 4).unwrap());
    assert_eq!(breadth_first(2, 0, 1), Err(Error::Empty { what: "stage" }));
}

#[test]
fn nothing_to_do_is_an_error() {
    for generate in [gpipe, one_f_one_b, forward_only, |p, m| breadth_first(p, 2, m)] {
        assert_eq!(generate(0, 4), Err(Error::Empty { what: "stage" }));
        assert_eq!(generate(4, 0), Err(Error::Empty { what: "micro-batch" }));
    }
}

#[test]
fn lowered_one_f_one_b() {
    let lowered = lower(&one_f_one_b(2, 2).unwrap()).unwrap();
    assert_eq!(
        lowered.to_string(),
        "0F0,0SEND_F0,0F1,0WAIT_SEND_F0,0SEND_F1,0RECV_B0,0WAIT_RECV_B0,0B0,0RECV_B1,0WAIT_RECV_B1,0B1,0WAIT_SEND_F1\n\
         1RECV_F0,1WAIT_RECV_F0,1F0,1RECV_F1,1B0,1SEND_B0,1WAIT_RECV_F1,1F1,1B1,1WAIT_SEND_B0,1SEND_B1,1WAIT_SEND_B1\n"
    );
}

#[test]
fn lowering_refuses_what_is_lowered_or_can_never_run() {
    let lowered = lower(&gpipe(2, 1).unwrap()).unwrap();
    assert!(
        matches!(lower(&lowered), Err(Error::AlreadyLowered { at }) if at.action.to_string() == "0SEND_F0")
    );
    assert!(
        matches!(add_waits(&lowered), Err(Error::AlreadyLowered { at }) if at.action.to_string() == "0WAIT_RECV_B0")
    );

    // Rank 0 wants the gradient of micro-batch 1 before it has made its activation.
    let stuck: Schedule = "0F0,0B0,0B1,0F1\n1F0,1F1,1B0,1B1\n".parse().unwrap();
    let Err(Error::Stuck { at, needs }) = lower(&stuck) else { panic!("{:?}", lower(&stuck)) };
    assert_eq!((at.rank, at.index, at.action.to_string()), (0, 1, "0B0".to_owned()));
    assert_eq!(needs, Message { flow: Flow::Backward, stage: 0, microbatch: 0 });
}

#[test]
fn text_that_is_no_schedule() {
    let parse = |text: &str| text.parse::<Schedule>().unwrap_err();
    assert_eq!(parse("0F0,0B0\n1F0, x1,1B0\n"), Error::Parse { line: 2, column: 2, text: "x1".into() });
    for text in [
        "(0F0)OVERLAP_F_B",
        "(0B0;0F1)OVERLAP_F_B",
        "(0F1;0I0)OVERLAP_F_B",
        "(0F1;0B0)",
        "((0F2;0B1)OVERLAP_F_B;0B0)OVERLAP_F_B",
        "F0",
        "0F",
        "0Q0",
        "0SEND0",
        "0F0F0",
        "-1F0",
        "99999999999F0",
        "0f0",
        "0 F0",
        "UNSHARD",
        "0UNSHARD0",
        "é",
        "0Fé",
    ] {
        assert_eq!(parse(text), Error::Parse { line: 1, column: 1, text: text.into() });
        assert_eq!(text.parse::<Action>().unwrap_err(), Error::NotAnAction { text: text.into() });
    }
    assert_eq!(parse(""), Error::Empty { what: "stage" });
    assert_eq!(parse("0F0,0B0\n3F0,3B0\n"), Error::UnplacedStage { stage: 1, named: 3 });
    // Neither number may make anybody allocate.
    assert_eq!(parse("4294967295F0"), Error::UnplacedStage { stage: 0, named: u32::MAX });
    assert_eq!(parse("0F4294967295"), Error::TooFewActions { actions: 1, stages: 1, microbatches: u32::MAX });
    assert_eq!(parse("0F0,0B0\n\n1F0,1B0\n"), Error::RankWithoutStage { rank: 1, ranks: 3 });
    assert!(matches!(parse("0F0,0B0\n1F0,1B0,0F0\n"), Error::WrongRank { owner: 0, .. }));
}

#[test]
fn what_torch_writes_besides_is_skipped() {
    for text in [
        "0F0,0F1,,,0B0,,0B1\n,1F0,1F1,1B0,1B1,,\n",
        "0UNSHARD,0F0,0F1,0B0,0B1,0RESHARD,0REDUCE_GRAD\r\n1UNSHARD,1F0,1F1,1B0,1B1,1REDUCE_GRAD,1WAIT_REDUCE_GRAD\r\n",
        "0F0,0F1,0B0,0B1\n1F0,1F1,1B0,1B1\n\n \n",
    ] {
        assert_eq!(text.parse(), gpipe(2, 2), "{text}");
    }
}

#[test]
fn schedules_in_halves_and_pairs() {
    assert_eq!(
        zb_h1(2, 3).unwrap().to_string(),
        "0F0,0F1,0I0,0W0,0F2,0I1,0W1,0I2,0W2\n1F0,1I0,1F1,1I1,1W0,1F2,1I2,1W1,1W2\n"
    );
    assert_eq!(
        zb_h2(2, 3).unwrap().to_string(),
        "0F0,0F1,0F2,0I0,0W0,0I1,0W1,0I2,0W2\n1F0,1I0,1F1,1I1,1F2,1I2,1W0,1W1,1W2\n"
    );
    assert_eq!(
        overlapped_1f1b(2, 1, 4, None).unwrap().to_string(),
        "0F0,0F1,0F2,(0F3;0B0)OVERLAP_F_B,0B1,0B2,0B3\n\
         1F0,(1F1;1B0)OVERLAP_F_B,(1F2;1B1)OVERLAP_F_B,(1F3;1B2)OVERLAP_F_B,1B3\n"
    );
    // DeepSeek's eight steps by hand: rank 0 has stage 0 of the first copy and the last of the second, which is 3 here.
    let dual = dual_pipe(2, 4).unwrap();
    assert_eq!(
        dual.to_string(),
        "0F0,3F2,0F1,3B2,(3F3;0B0)OVERLAP_F_B,3B3,0I1,0W1\n2F2,1F0,2F3,1B0,(1F1;2B2)OVERLAP_F_B,1B1,2I3,2W3\n"
    );
    assert_eq!(dual.placement(), &Placement::bidirectional(2).unwrap());
    for schedule in [dual, dual_pipe(4, 10).unwrap(), dual_pipe_v(3, 7).unwrap(), zb_v(3, 4).unwrap()] {
        assert_eq!(schedule.to_string().parse::<Schedule>().unwrap(), schedule);
        let lowered = lower(&schedule).unwrap();
        assert_eq!(lowered.to_string().parse::<Schedule>().unwrap(), lowered);
        assert!(matches!(lowered.serial(), Err(Error::AlreadyLowered { .. })));
        let serial = schedule.serial().unwrap();
        assert!(serial.actions().all(|at| !matches!(at.action.kind, Kind::Overlap { .. })));
        assert_eq!(
            serial.to_string().replace("OVERLAP_F_B", ""),
            schedule.to_string().replace(['(', ')'], "").replace(';', ",").replace("OVERLAP_F_B", "")
        );
    }
}

#[test]
fn sizes_that_a_schedule_is_not_defined_for() {
    let text = |schedule: Result<Schedule, Error>| schedule.unwrap_err().to_string();
    assert_eq!(
        text(dual_pipe_v(3, 5)),
        "DualPipeV on 3 ranks cannot take 5 micro-batches: it needs at least 6"
    );
    assert_eq!(
        text(dual_pipe(3, 8)),
        "DualPipe on 3 ranks cannot take 8 micro-batches: it needs an even number of ranks"
    );
    assert!(text(dual_pipe(4, 7)).ends_with("it needs an even number of them, at least 8"));
    for generate in [
        gpipe,
        one_f_one_b,
        forward_only,
        zb_h1,
        zb_h2,
        zb_v,
        v_half,
        v_min,
        dual_pipe,
        dual_pipe_v,
        |p, m| breadth_first(p, 2, m),
        |p, m| interleaved_1f1b(p, 2, m, None),
        |p, m| overlapped_1f1b(p, 2, m, None),
    ] {
        assert_eq!(generate(0, 4), Err(Error::Empty { what: "stage" }));
        assert!(generate(4, 0).is_err());
        assert!(matches!(generate(u32::MAX, u32::MAX), Err(Error::TooManyStages { .. })));
    }
}

/// Far more ranks than micro-batches, and a rank that is found missing only at the end: what it takes grows as what is made.
#[test]
fn many_ranks() {
    let ranks = 100_000;
    for generate in [gpipe, one_f_one_b, zb_h1, zb_h2, zb_v] {
        let stages = generate(ranks, 1).unwrap().placement().stages();
        assert!(stages == ranks || stages == 2 * ranks);
    }
    let last = 1 << 21;
    let without_last = std::iter::once(last + 1).chain((0..last).rev()).collect();
    assert_eq!(Placement::new(without_last), Err(Error::RankWithoutStage { rank: last, ranks: last + 2 }));
}

#[test]
fn schedules_by_name() {
    let sizes = |virtual_stages| Sizes { ranks: 4, virtual_stages, microbatches: 10, group: None };
    for &named in Named::ALL {
        assert_eq!(named.to_string().parse::<Named>(), Ok(named));
        assert!(named.torch_name().is_none_or(|name| name.parse() == Ok(named)));
        match named.virtual_stages() {
            Some(v) => {
                assert!(named.generate(sizes(v)).is_ok(), "{named}");
                let error = named.generate(sizes(v + 1)).unwrap_err();
                assert!(matches!(error, Error::VirtualStages { got, .. } if got == v + 1), "{error}");
            }
            None => assert!((1..=3).all(|v| named.generate(sizes(v)).is_ok()), "{named}"),
        }
        let schedule = named.generate(sizes(named.virtual_stages().unwrap_or(2))).unwrap();
        let overlaps = schedule.actions().any(|at| matches!(at.action.kind, Kind::Overlap { .. }));
        assert_eq!(overlaps, named.has_overlaps(), "{named}");
    }
    assert_eq!(Named::ZbV.generate(sizes(2)), zb_v(4, 10));
    assert_eq!(Named::DualPipe.generate(sizes(2)), dual_pipe(4, 10));
    // Two groups of five.
    assert_eq!(Named::Interleaved1F1B.generate(sizes(2)), interleaved_1f1b(4, 2, 10, Some(5)));
    let group = Sizes { group: Some(6), ..sizes(2) };
    assert_eq!(Named::Interleaved1F1B.generate(group), interleaved_1f1b(4, 2, 10, Some(6)));
    for none in [Sizes { ranks: 0, ..sizes(2) }, Sizes { microbatches: 0, ..sizes(2) }] {
        assert!(Named::ALL.iter().all(|named| named.generate(none).is_err()));
    }
    let error = "ZBV".parse::<Named>().unwrap_err().to_string();
    assert!(error.starts_with("\"ZBV\" is no schedule; there are gpipe, 1f1b, "), "{error}");
}

#[test]
fn placements() {
    let v = Placement::new(vec![0, 1, 1, 0]).unwrap();
    assert_eq!((v.ranks(), v.stages()), (2, 4));
    assert_eq!((v.stages_of(0), v.stages_of(1), v.stages_of(2)), (&[0, 3][..], &[1, 2][..], &[][..]));
    assert_eq!((v.rank_of(3), v.rank_of(4)), (Some(0), None));
    assert_eq!(Placement::new(vec![0, 2]), Err(Error::RankWithoutStage { rank: 1, ranks: 3 }));
    assert_eq!(Placement::new(vec![0, 3, 1]), Err(Error::RankWithoutStage { rank: 2, ranks: 4 }));
    assert_eq!(Placement::new(vec![u32::MAX]), Err(Error::RankWithoutStage { rank: 0, ranks: u32::MAX }));
}

#[test]
fn actions_stand_where_they_can() {
    let one = |rank_of: Vec<u32>, m, pass, lists: &[&[&str]]| {
        let lists = lists.iter().map(|list| list.iter().map(|a| a.parse().unwrap()).collect()).collect();
        Schedule::new(Placement::new(rank_of).unwrap(), m, pass, lists).unwrap_err()
    };
    let both = Pass::ForwardBackward;
    assert_eq!(one(vec![0, 1], 1, both, &[&["0F0", "0B0"]]), Error::Lists { lists: 1, ranks: 2 });
    assert!(matches!(one(vec![0], 1, both, &[&["1F0"]]), Error::UnknownStage { stages: 1, .. }));
    assert!(matches!(one(vec![0], 1, both, &[&["0F1"]]), Error::UnknownMicrobatch { microbatches: 1, .. }));
    assert!(matches!(one(vec![0], 1, Pass::ForwardOnly, &[&["0F0", "0B0"]]), Error::ForwardOnly { .. }));
    for no_boundary in
        ["0RECV_F0", "0SEND_B0", "2SEND_F0", "2RECV_B0", "0SEND_F0", "1RECV_F0", "1WAIT_SEND_B0"]
    {
        // Stages 0 and 1 share rank 0; stage 2 is the last.
        let mut lists: [Vec<&str>; 2] = [vec!["0F0", "1F0"], vec!["2F0"]];
        lists[usize::from(no_boundary.starts_with('2'))].push(no_boundary);
        let error = one(vec![0, 0, 1], 1, both, &[&lists[0], &lists[1]]);
        assert!(matches!(error, Error::NoBoundary { at } if at.action.to_string() == no_boundary), "{error}");
    }
}

#[test]
fn tags_tell_messages_apart() {
    let mut tags: Vec<u64> = Vec::new();
    for flow in [Flow::Forward, Flow::Backward] {
        for stage in [0, 1, 2, 3, (1 << 31) - 1] {
            for microbatch in [0, 1, 2, u32::MAX] {
                tags.push(Message { flow, stage, microbatch }.tag());
            }
        }
    }
    let all = tags.len();
    tags.sort_unstable();
    tags.dedup();
    assert_eq!(tags.len(), all);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever order can run is lowered to one that is valid, and its text form is the same schedule.
    #[test]
    fn whatever_can_run_is_lowered_to_a_valid_program(p in 1_u32..=8, extra in 0_u32..=8, m in 1_u32..=16, seed: u64) {
        let schedule = draw_schedule(p, extra, m, &mut Draws(seed));
        prop_assert_eq!(&schedule.to_string().parse::<Schedule>().unwrap(), &schedule);
        let lowered = lower(&schedule).unwrap();
        prop_assert_eq!(&lowered.to_string().parse::<Schedule>().unwrap(), &lowered);
        let compute = |rank| lowered.list(rank).iter().filter(|a| a.kind.is_compute()).copied().collect::<Vec<_>>();
        for rank in 0..p {
            prop_assert_eq!(&compute(rank)[..], schedule.list(rank));
        }
        let sends = lowered.actions().filter(|at| matches!(at.action.kind, Kind::Send(_))).count();
        let crossings = (1..p + extra).filter(|&s| {
            schedule.placement().rank_of(s - 1) != schedule.placement().rank_of(s)
        }).count();
        prop_assert_eq!(sends, 2 * crossings * m as usize);
        prop_assert!(validate(lowered, None).is_ok());
    }
}

/// A text costs what its length says, also where each of its stages is a copy of the pipeline.
#[test]
fn as_many_copies_as_stages() {
    let text: String = (0..20_000).map(|rank| format!("{rank}F{rank},{rank}B{rank}\n")).collect();
    let schedule: Schedule = text.parse().unwrap();
    assert_eq!((schedule.placement().copies(), schedule.microbatches()), (20_000, 20_000));
    assert!(validate(lower(&schedule).unwrap(), Some(1)).is_ok());
}
