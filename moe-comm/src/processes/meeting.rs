//! An operation on the hub's board: it moves nothing, and says so to those that wait for it.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use moe_topology::GroupKey;

use super::wire::ToLine;
use crate::board::Job;
use crate::{Result, Signature};

/// What a rank says that it does.
pub(super) enum Note {
    /// An operation of a group.
    Call(Signature),
    /// Something else that all ranks of a group do, by its name.
    Step(GroupKey, &'static str),
}

/// What a rank hands in.
pub(super) struct Give {
    /// Number of the group.
    pub(super) group: u64,
    /// Bytes for all.
    pub(super) offer: Option<Arc<[u8]>>,
    /// Where the rank wants to hear that all have arrived, and under which number.
    pub(super) answer: Option<(Sender<Option<ToLine>>, u64)>,
}

/// An operation at which all have arrived.
pub(super) struct Meeting {
    parties: Vec<Give>,
    bytes: Arc<[u8]>,
}

impl Job for Meeting {
    type Note = Note;
    type Give = Give;
    type Take = ();

    fn group(note: &Note) -> GroupKey {
        match note {
            Note::Call(signature) => signature.group,
            Note::Step(group, _) => *group,
        }
    }

    fn name(note: &Note) -> &'static str {
        match note {
            Note::Call(signature) => signature.op.name(),
            Note::Step(_, name) => name,
        }
    }

    fn agree(mine: (usize, &Note), theirs: (usize, &Note)) -> bool {
        match (mine.1, theirs.1) {
            (Note::Call(call), Note::Call(other)) => call.agrees(mine.0, other, theirs.0),
            (Note::Step(_, name), Note::Step(_, other)) => name == other,
            _ => false,
        }
    }

    fn describe(note: &Note) -> String {
        match note {
            Note::Call(signature) => signature.to_string(),
            Note::Step(group, name) => format!("{name} of {group}"),
        }
    }

    fn join(parties: Vec<(Note, Give)>) -> Self {
        let parties: Vec<_> = parties.into_iter().map(|(_, give)| give).collect();
        let bytes = parties.iter().find_map(|give| give.offer.clone()).unwrap_or_default();
        Meeting { parties, bytes }
    }

    /// The last to arrive answers all: nobody waits on the board.
    fn is_small(&self) -> bool {
        true
    }

    fn fill(&self, index: usize, _: &mut ()) -> Result<()> {
        let Give { group, answer, .. } = &self.parties[index];
        if let Some((line, answer)) = answer {
            let done = ToLine::Done { answer: *answer, group: *group, bytes: self.bytes.clone() };
            // A line that has ended is no matter of this operation.
            let _ = line.send(Some(done));
        }
        Ok(())
    }
}
