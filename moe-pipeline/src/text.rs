//! Schedules as text, in the form of torch's pipelining: one line per rank, actions separated by commas.
//!
//! `0F0,0F1,0B0,0B1` is what rank 0 does; empty fields (torch's idle steps) are skipped. Placement, number of
//! micro-batches and pass are read off the actions; where a stage begins with a later micro-batch than the first, it is a
//! further copy of the pipeline that begins. An overlap is `(0F3;3B1)OVERLAP_F_B`. Waits are `0WAIT_SEND_F0` and
//! `1WAIT_RECV_F0`. Torch reads lists of passes (`_load_csv`) and adds messages of its own; not our waits, as it has none for
//! receives and before 2.15 none for sends.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use crate::{Action, Error, Flow, Kind, Pass, Placement, Result, Schedule};

/// The kind of a short name. (An overlap is no single one.)
fn kind(text: &str) -> Option<Kind> {
    use Flow::{Backward, Forward};
    Some(match text {
        "F" => Kind::Forward,
        "I" => Kind::BackwardInput,
        "W" => Kind::BackwardWeight,
        "B" => Kind::Backward,
        "SEND_F" => Kind::Send(Forward),
        "SEND_B" => Kind::Send(Backward),
        "RECV_F" => Kind::Recv(Forward),
        "RECV_B" => Kind::Recv(Backward),
        "WAIT_SEND_F" => Kind::WaitSend(Forward),
        "WAIT_SEND_B" => Kind::WaitSend(Backward),
        "WAIT_RECV_F" => Kind::WaitRecv(Forward),
        "WAIT_RECV_B" => Kind::WaitRecv(Backward),
        _ => return None,
    })
}

/// An action that is no overlap.
fn single(text: &str) -> Option<Action> {
    let digit = |c: char| c.is_ascii_digit();
    let (head, microbatch) = text.split_at(text.trim_end_matches(digit).len());
    let name = head.trim_start_matches(digit);
    let stage = &head[..head.len() - name.len()];
    Some(Action { stage: stage.parse().ok()?, kind: kind(name)?, microbatch: microbatch.parse().ok()? })
}

fn overlap(text: &str) -> Option<Action> {
    let (forward, backward) = text.strip_prefix('(')?.strip_suffix(")OVERLAP_F_B")?.split_once(';')?;
    let (forward, backward) = (single(forward)?, single(backward)?);
    let parts = (forward.kind, backward.kind) == (Kind::Forward, Kind::Backward);
    parts.then(|| Action::overlap((forward.stage, forward.microbatch), (backward.stage, backward.microbatch)))
}

/// Whether it is an action of torch's sharded data parallelism, which has no micro-batch.
fn shards(text: &str) -> bool {
    let name = text.trim_start_matches(|c: char| c.is_ascii_digit());
    name != text && matches!(name, "UNSHARD" | "RESHARD" | "REDUCE_GRAD" | "WAIT_REDUCE_GRAD")
}

impl FromStr for Action {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        single(text).or_else(|| overlap(text)).ok_or_else(|| Error::NotAnAction { text: text.to_owned() })
    }
}

impl FromStr for Schedule {
    type Err = Error;

    /// Reads what [`Display`](fmt::Display) writes, and torch's `_dump_csv`, with and without messages; what that has of sharded data
    /// parallelism (`0UNSHARD`, `0RESHARD`, `0REDUCE_GRAD`, `0WAIT_REDUCE_GRAD`) is left out. (Messages of torch 2.9 still need
    /// [`add_waits`](crate::add_waits). Those of 2.15 have waits for sends alone and cannot be run here: take its lists of passes,
    /// `_dump_csv(…, format="compute_only")`, and [`lower`](crate::lower()) them.)
    ///
    /// A stage belongs to the rank on whose line it first computes; a text without backward actions is forward-only.
    fn from_str(text: &str) -> Result<Self> {
        let mut lists = Vec::new();
        for (line, row) in (1..).zip(text.trim_end().lines()) {
            let mut list: Vec<Action> = Vec::new();
            for (column, field) in (1..).zip(row.split(',').map(str::trim)) {
                if !field.is_empty() && !shards(field) {
                    let action =
                        field.parse().map_err(|_| Error::Parse { line, column, text: field.to_owned() })?;
                    list.push(action);
                }
            }
            lists.push(list);
        }
        let compute = || {
            let with_rank =
                (0..).zip(&lists).flat_map(|(rank, list)| list.iter().map(move |action| (rank, action)));
            with_rank
                .filter(|(_, action)| action.kind.is_compute())
                .flat_map(|(rank, action)| action.parts().map(move |part| (rank, part)))
        };
        let mut rank_of = BTreeMap::new();
        let mut first = BTreeMap::new();
        for (rank, action) in compute() {
            rank_of.entry(action.stage).or_insert(rank);
            let first = first.entry(action.stage).or_insert(action.microbatch);
            *first = action.microbatch.min(*first);
        }
        if let Some((stage, (&named, _))) = (0..).zip(&rank_of).find(|(stage, (named, _))| *stage != **named)
        {
            return Err(Error::UnplacedStage { stage, named });
        }
        let stages = rank_of.len();
        let length = first
            .values()
            .position(|&first| first > 0)
            .filter(|&length| length > 0 && stages.is_multiple_of(length))
            .unwrap_or(stages);
        let copies = stages.checked_div(length).unwrap_or(1) as u32;
        let placement = Placement::with_copies(rank_of.into_values().collect(), copies)?;
        let microbatches =
            compute().map(|(_, action)| action.microbatch).max().map_or(0, |m| m.saturating_add(1));
        let pass = match compute().any(|(_, part)| part.kind != Kind::Forward) {
            true => Pass::ForwardBackward,
            false => Pass::ForwardOnly,
        };
        Schedule::new(placement, microbatches, pass, lists)
    }
}

impl fmt::Display for Schedule {
    /// One line per rank, actions separated by commas.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for rank in 0..self.placement().ranks() {
            for (index, action) in self.list(rank).iter().enumerate() {
                let comma = if index == 0 { "" } else { "," };
                write!(f, "{comma}{action}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}
