//! Schedules as text, in the form of torch's pipelining: one line per rank, actions separated by commas.
//!
//! `0F0,0F1,0B0,0B1` is what rank 0 does; empty fields (torch's idle steps) are skipped. Placement, number of
//! micro-batches and pass are read off the actions. Waits, which torch 2.9 does not write, are `0WAIT_SEND_F0` and
//! `1WAIT_RECV_F0`.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use crate::{Action, Error, Flow, Kind, Pass, Placement, Result, Schedule};

impl FromStr for Kind {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        use Flow::{Backward, Forward};
        Ok(match text {
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
            _ => return Err(Error::NotAnAction { text: text.to_owned() }),
        })
    }
}

impl FromStr for Action {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let error = || Error::NotAnAction { text: text.to_owned() };
        let digit = |c: char| c.is_ascii_digit();
        let (head, microbatch) = text.split_at(text.trim_end_matches(digit).len());
        let kind = head.trim_start_matches(digit);
        let stage = &head[..head.len() - kind.len()];
        Ok(Action {
            stage: stage.parse().map_err(|_| error())?,
            kind: kind.parse().map_err(|_| error())?,
            microbatch: microbatch.parse().map_err(|_| error())?,
        })
    }
}

impl FromStr for Schedule {
    type Err = Error;

    /// Reads what [`Display`](fmt::Display) writes, and torch's CSV. A stage belongs to the rank on whose line it first
    /// computes; a text without backward actions is forward-only.
    fn from_str(text: &str) -> Result<Self> {
        let mut lists = Vec::new();
        for (line, row) in (1..).zip(text.lines()) {
            let mut list: Vec<Action> = Vec::new();
            for (column, field) in (1..).zip(row.split(',').map(str::trim)) {
                if !field.is_empty() {
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
            with_rank.filter(|(_, action)| action.kind.is_compute())
        };
        let mut rank_of = BTreeMap::new();
        for (rank, action) in compute() {
            rank_of.entry(action.stage).or_insert(rank);
        }
        if let Some((stage, (&named, _))) = (0..).zip(&rank_of).find(|(stage, (named, _))| *stage != **named)
        {
            return Err(Error::UnplacedStage { stage, named });
        }
        let placement = Placement::new(rank_of.into_values().collect())?;
        let microbatches =
            compute().map(|(_, action)| action.microbatch).max().map_or(0, |m| m.saturating_add(1));
        let pass = match compute().any(|(_, action)| action.kind != Kind::Forward) {
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
