//! Laws of the host arithmetic: rows labelled with their origin are moved by plain vectors as the plan says.

use moe_dispatch::plan::{ChunkOrder, Counts};
use moe_dispatch::{Error, Grid, InnerAxis};
use proptest::prelude::*;

/// A row: EP and ETP rank of its source, its expert, its number there.
type Row = (usize, usize, usize, usize);

#[derive(Debug, Clone)]
struct World {
    ep: usize,
    etp: usize,
    inner: InnerAxis,
    num_experts: usize,
    /// `[position][expert]`.
    counts: Vec<Vec<i32>>,
}

impl World {
    fn grid(&self, q: usize, slice: usize) -> Grid {
        Grid::new((q, self.ep), (slice, self.etp), self.inner).unwrap()
    }

    fn exchanged(&self) -> Vec<i32> {
        let record = |(position, counts): (usize, &Vec<i32>)| {
            let mut record = vec![0];
            record.extend(counts.iter().scan(0, |end, count| {
                *end += count;
                Some(*end)
            }));
            record.push(position as i32 + 1);
            record
        };
        self.counts.iter().enumerate().flat_map(record).collect()
    }

    fn plan(&self, q: usize, slice: usize) -> Counts {
        Counts::from_exchange(self.grid(q, slice), self.num_experts, &self.exchanged()).unwrap()
    }

    /// A rank's rows, sorted by expert.
    fn rows(&self, q: usize, slice: usize) -> Vec<Row> {
        let counts = &self.counts[self.grid(0, 0).position(q, slice)];
        let of = |(expert, &count): (usize, &i32)| (0..count as usize).map(move |n| (q, slice, expert, n));
        counts.iter().enumerate().flat_map(of).collect()
    }
}

fn worlds() -> impl Strategy<Value = World> {
    (1usize..5, 1usize..4, 1usize..4, any::<bool>()).prop_flat_map(|(ep, etp, per_rank, ep_inner)| {
        let num_experts = ep * per_rank;
        let count = prop_oneof![3 => Just(0), 5 => 0..4i32, 1 => Just(9)];
        proptest::collection::vec(proptest::collection::vec(count, num_experts), ep * etp).prop_map(
            move |counts| {
                let inner = if ep_inner { InnerAxis::Ep } else { InnerAxis::Etp };
                World { ep, etp, inner, num_experts, counts }
            },
        )
    })
}

proptest! {
    #[test]
    fn rows_reach_their_expert_and_return(world in worlds()) {
        let per_rank = world.num_experts / world.ep;
        for q in 0..world.ep {
            for slice in 0..world.etp {
                let plan = world.plan(q, slice);
                let splits = plan.splits();

                // All-to-all over EP, then gather over ETP, on labelled rows.
                let mut received = vec![];
                for t in 0..world.etp {
                    let before = received.len();
                    for p in 0..world.ep {
                        let sender = world.plan(p, t).splits();
                        let rows = world.rows(p, t);
                        prop_assert_eq!(sender.send.iter().sum::<usize>(), rows.len());
                        let first: usize = sender.send[..q].iter().sum();
                        let block = &rows[first..first + sender.send[q]];
                        if t == slice {
                            prop_assert_eq!(splits.recv[p], block.len());
                        }
                        received.extend_from_slice(block);
                    }
                    prop_assert_eq!(splits.gathered[t], received.len() - before);
                }
                prop_assert_eq!(plan.received_chunks().iter().sum::<usize>(), received.len());

                let order = ChunkOrder::new(&plan.received_chunks(), per_rank, received.len());
                let sorted: Vec<Row> = match &order {
                    Some(order) => order.to_experts.iter().map(|&row| received[row as usize]).collect(),
                    None => received.clone(),
                };
                let mut expected = received.clone();
                expected.sort_by_key(|&(p, t, expert, n)| (expert, t, p, n));
                prop_assert_eq!(&sorted, &expected);
                prop_assert_eq!(order.is_none(), received == expected);
                if let Some(order) = &order {
                    let back: Vec<Row> = order.to_sources.iter().map(|&row| sorted[row as usize]).collect();
                    prop_assert_eq!(&back, &received);
                }

                // Two rows more than arrive.
                let longer = ChunkOrder::new(&plan.received_chunks(), per_rank, received.len() + 2);
                let longer = longer.expect("rows are added");
                let rows: Vec<Option<Row>> =
                    longer.to_experts.iter().map(|&row| received.get(row as usize).copied()).collect();
                let padded: Vec<Option<Row>> = expected.iter().copied().map(Some).chain([None; 2]).collect();
                prop_assert_eq!(rows, padded);
                prop_assert_eq!(longer.to_sources.len(), received.len());

                let most = (0..world.ep).map(|q| world.plan(q, slice).expert_rows().iter().sum::<usize>());
                prop_assert_eq!(plan.most_received(), most.max().unwrap());
                prop_assert_eq!(plan.clone().without_rows().most_received(), 0);

                let offsets = plan.offsets();
                prop_assert_eq!(offsets.len(), per_rank + 1);
                for (local, ends) in offsets.windows(2).enumerate() {
                    let rows = &sorted[ends[0] as usize..ends[1] as usize];
                    prop_assert!(rows.iter().all(|row| row.2 == q * per_rank + local));
                    prop_assert_eq!(plan.expert_rows()[local], rows.len());
                }
                prop_assert_eq!(offsets[per_rank] as usize, sorted.len());
                let tokens: Vec<usize> = (1..=world.counts.len()).collect();
                prop_assert_eq!(plan.tokens(), &tokens[..]);
            }
        }
    }
}

#[test]
fn what_is_no_count_is_refused() {
    let grid = Grid::new((0, 2), (0, 1), InnerAxis::Etp).unwrap();
    let refused =
        |num_experts, exchanged: &[i32]| Counts::from_exchange(grid, num_experts, exchanged).unwrap_err();
    assert_eq!(refused(3, &[]), Error::Experts { num_experts: 3, ep: 2 });
    assert_eq!(refused(0, &[]), Error::Experts { num_experts: 0, ep: 2 });
    for exchanged in [
        &[0, 1, 1, 1, 0, 1, 1][..],              // too short
        &[0, 1, 0, 1, 0, 1, 1, 1],               // descending
        &[1, 1, 1, 1, 0, 1, 1, 1],               // not from 0
        &[0, 1, 1, -1, 0, 1, 1, 1],              // negative tokens
        &[0, i32::MAX, i32::MAX, 1, 0, 1, 1, 1], // too many rows in sum
    ] {
        assert!(matches!(refused(2, exchanged), Error::Counts { .. }), "{exchanged:?}");
    }
    assert!(matches!(Counts::uniform(grid, 2, usize::MAX, 1), Err(Error::Counts { .. })));
    // Too many rows for the other rank.
    assert!(matches!(refused(2, &[0, 0, i32::MAX, 1, 0, 0, 1, 1]), Error::Counts { .. }));
    assert!(Counts::from_exchange(grid, 2, &[0, 1, 1, 1, 0, 1, 1, 1]).is_ok());
}

#[test]
fn a_coordinate_outside_its_axis_is_refused() {
    let refused = Grid::new((0, 2), (3, 3), InnerAxis::Ep).unwrap_err();
    assert_eq!(refused, Error::Coordinate { axis: "etp", rank: 3, size: 3 });
    assert!(Grid::new((0, 0), (0, 1), InnerAxis::Ep).is_err());
}
