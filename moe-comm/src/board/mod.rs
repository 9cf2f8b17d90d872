//! Where the ranks of a world meet: the core of the thread communicator, and of the hub of processes.
//!
//! A **slot** is one operation of one group: its parties arrive in any order, and when the last one has arrived, the
//! work that gives every party its result is there to be done. Small work is done by the last to arrive; large work
//! is shared among the parties that wait. Nobody waits for a party that merely has not called `wait`: whoever waits
//! does what is left. When an operation is done, and before anyone's `wait` returns, all that was sent has been let
//! go, so that a sender may write its memory again.
//!
//! One lock guards the bookkeeping of a whole world; work is done outside of it. Waiting is by condition variable,
//! one for each rank.

mod sync;

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use moe_topology::GroupKey;

use self::sync::{Condvar, Mutex, MutexGuard};
use crate::{Error, Result};

/// What the board needs to know of the operations that meet on it.
pub trait Job: Sized + Send + Sync + 'static {
    /// What a rank says that it does.
    type Note: Send;
    /// What a rank lets the others read.
    type Give: Send;
    /// Where a rank receives.
    type Take: Send;

    /// The group that does it.
    fn group(note: &Self::Note) -> GroupKey;
    /// Name of the operation.
    fn name(note: &Self::Note) -> &'static str;
    /// Compares the notes of two parties (their indices in the slot, and what they noted); an error describes both.
    fn agree(mine: (usize, &Self::Note), theirs: (usize, &Self::Note)) -> bool;
    /// Describes a note.
    fn describe(note: &Self::Note) -> String;
    /// The operation, when all have arrived.
    fn join(parties: Vec<(Self::Note, Self::Give)>) -> Self;
    /// Whether sharing the work costs more than doing it.
    fn is_small(&self) -> bool;
    /// Gives party `index` its result. Called once for each party, by any of them.
    fn fill(&self, index: usize, take: &mut Self::Take) -> Result<()>;
}

/// The ranks of one group, or of several, as the board knows them.
#[derive(Debug)]
pub struct Members {
    /// Their number in the world, the same on all of them.
    pub id: usize,
    /// The world ranks.
    pub ranks: Box<[usize]>,
}

/// Who meets in a slot: a whole group, or two of its ranks for a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lane {
    /// All ranks of the group.
    All,
    /// The sender (party 0) and the receiver (party 1) of a message, as ranks of the group.
    Pair(usize, usize),
    /// All ranks of the group, as they make it: once, and before any operation.
    Founding,
}

impl Lane {
    fn parties(self, group: &Members) -> usize {
        match self {
            Lane::All | Lane::Founding => group.ranks.len(),
            Lane::Pair(..) => 2,
        }
    }

    fn world_rank(self, group: &Members, index: usize) -> Option<usize> {
        let at = match (self, index) {
            (Lane::All | Lane::Founding, i) => i,
            (Lane::Pair(from, _), 0) => from,
            (Lane::Pair(_, to), 1) => to,
            (Lane::Pair(..), _) => return None,
        };
        group.ranks.get(at).copied()
    }
}

/// A party's place in a slot.
#[derive(Debug, Clone)]
pub struct Seat {
    /// The group.
    pub group: Arc<Members>,
    /// Which of its ranks meet.
    pub lane: Lane,
    /// Number of the operation in this lane.
    pub sequence: u64,
    /// Which party this is.
    pub index: usize,
}

impl Seat {
    fn id(&self) -> SlotId {
        SlotId { group: self.group.id, lane: self.lane, sequence: self.sequence }
    }

    fn parties(&self) -> usize {
        self.lane.parties(&self.group)
    }

    /// The world rank that sits there, if there is such a seat among such parties.
    pub fn world_rank(&self) -> Option<usize> {
        let whole = (0..self.parties()).all(|index| self.lane.world_rank(&self.group, index).is_some());
        self.lane.world_rank(&self.group, self.index).filter(|_| whole)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct SlotId {
    group: usize,
    lane: Lane,
    sequence: u64,
}

/// An operation of a group, as a failure names it.
#[derive(Debug, Clone, Copy)]
struct Place {
    group: GroupKey,
    op: &'static str,
    sequence: u64,
}

/// Where the ranks of a world meet.
pub struct Board<J: Job> {
    state: Mutex<State<J>>,
    bells: Vec<Condvar>,
    deadline: Duration,
}

struct State<J: Job> {
    failure: Option<Error>,
    slots: HashMap<SlotId, Slot<J>>,
    ranks: Vec<RankState>,
    /// Operations that ranks have started.
    arrivals: u64,
}

#[derive(Default, Clone)]
struct RankState {
    /// The slots in which the rank waits now: one, unless it waits on several threads.
    waiting: Vec<SlotId>,
    /// The last operation it started.
    last: Option<(SlotId, Place)>,
    /// It can start nothing any more.
    gone: bool,
}

struct Slot<J: Job> {
    group: Arc<Members>,
    lane: Lane,
    place: Place,
    /// When the first party arrived.
    since: Instant,
    stage: Stage<J>,
    /// Parties that still hold a ticket, or have not arrived.
    staying: usize,
}

enum Stage<J: Job> {
    Gathering(Vec<Option<Party<J>>>),
    Working { job: Arc<J>, takes: Vec<Work<J::Take>>, unfinished: usize },
    Done(Vec<Option<J::Take>>),
}

struct Party<J: Job> {
    note: J::Note,
    give: J::Give,
    take: J::Take,
}

enum Work<T> {
    Open(T),
    Claimed,
    Finished(T),
}

/// The places to fill of some parties, by index.
type Takes<J> = Vec<(usize, <J as Job>::Take)>;

impl<J: Job> Slot<J> {
    fn world_rank(&self, index: usize) -> usize {
        self.lane.world_rank(&self.group, index).expect("a party of the slot")
    }

    /// World ranks that have not arrived.
    fn missing(&self) -> Vec<usize> {
        self.gathering(Option::is_none)
    }

    /// World ranks that have arrived, while others have not.
    fn arrived(&self) -> Vec<usize> {
        self.gathering(Option::is_some)
    }

    fn gathering(&self, seated: fn(&Option<Party<J>>) -> bool) -> Vec<usize> {
        match &self.stage {
            Stage::Gathering(seats) => {
                (0..seats.len()).filter(|&i| seated(&seats[i])).map(|i| self.world_rank(i)).collect()
            }
            _ => Vec::new(),
        }
    }

    fn members(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.lane.parties(&self.group)).map(|i| self.world_rank(i))
    }

    /// Takes work that nobody does yet: all of it if it is small, else one piece, the party's own if that is open.
    fn claim(&mut self, index: usize) -> Option<(Arc<J>, Takes<J>)> {
        let Stage::Working { job, takes, .. } = &mut self.stage else { return None };
        let wanted = if job.is_small() { takes.len() } else { 1 };
        let mut claimed = Vec::new();
        for i in (index..takes.len()).chain(0..index) {
            if claimed.len() == wanted {
                break;
            }
            match std::mem::replace(&mut takes[i], Work::Claimed) {
                Work::Open(take) => claimed.push((i, take)),
                other => takes[i] = other,
            }
        }
        (!claimed.is_empty()).then(|| (job.clone(), claimed))
    }

    /// Puts finished work back; true if that was the last of it.
    fn finish(&mut self, filled: Takes<J>) -> bool {
        let Stage::Working { takes, unfinished, .. } = &mut self.stage else { return false };
        *unfinished -= filled.len();
        for (i, take) in filled {
            takes[i] = Work::Finished(take);
        }
        if *unfinished > 0 {
            return false;
        }
        let takes = std::mem::take(takes).into_iter().map(|work| match work {
            Work::Finished(take) => Some(take),
            Work::Open(_) | Work::Claimed => None,
        });
        // Lets go of the job, and with it of everything that was sent.
        self.stage = Stage::Done(takes.collect());
        true
    }
}

impl<J: Job> State<J> {
    /// World ranks to blame when the parties of a slot have waited long enough: those that did not arrive, unless
    /// they wait themselves for others. `None`: they all wait for each other.
    fn culprits(&self, id: SlotId) -> Option<(Place, Vec<usize>)> {
        let mut followed = vec![false; self.ranks.len()];
        let mut queue = vec![id];
        while let Some(slot) = queue.pop().and_then(|id| self.slots.get(&id)) {
            let mut idle = Vec::new();
            for rank in slot.missing() {
                let blocked: Vec<_> =
                    self.ranks[rank].waiting.iter().copied().filter(|id| self.incomplete(id)).collect();
                if blocked.is_empty() {
                    idle.push(rank);
                } else if !std::mem::replace(&mut followed[rank], true) {
                    queue.extend(blocked);
                }
            }
            if !idle.is_empty() {
                return Some((slot.place, idle));
            }
        }
        None
    }

    fn incomplete(&self, id: &SlotId) -> bool {
        self.slots.get(id).is_some_and(|slot| matches!(slot.stage, Stage::Gathering(_)))
    }

    /// What every waiting rank waits for, for the report of a deadlock.
    fn waits(&self) -> String {
        let mut waits = Vec::new();
        for (rank, state) in self.ranks.iter().enumerate() {
            for slot in state.waiting.iter().filter_map(|id| self.slots.get(id)) {
                let Place { group, op, sequence } = slot.place;
                waits.push(format!("rank {rank} for {:?} in {op} #{sequence} of {group}", slot.missing()));
            }
        }
        waits.join(", ")
    }
}

fn failure(rank: usize, place: Option<Place>, why: String) -> Error {
    Error::Poisoned {
        rank,
        group: place.map(|p| p.group),
        op: place.map(|p| p.op),
        sequence: place.map(|p| p.sequence),
        why: why.into(),
    }
}

impl<J: Job> Board<J> {
    /// A board for `size` ranks, which wait for each other for at most `deadline`.
    pub fn new(size: usize, deadline: Duration) -> Self {
        Board {
            state: Mutex::new(State {
                failure: None,
                slots: HashMap::new(),
                ranks: vec![RankState::default(); size],
                arrivals: 0,
            }),
            bells: (0..size).map(|_| Condvar::new()).collect(),
            deadline,
        }
    }

    /// How long ranks wait for each other.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    /// The first failure.
    pub fn failure(&self) -> Option<Error> {
        self.lock().failure.clone()
    }

    /// How many operations the ranks have started: while it grows, some rank is alive.
    pub fn arrivals(&self) -> u64 {
        self.lock().arrivals
    }

    /// Operations that are not over.
    #[cfg(all(test, not(loom)))]
    pub(crate) fn slots(&self) -> usize {
        self.lock().slots.len()
    }

    /// Records a failure of `rank` by itself; false if the world had failed before. It is one of the last operation
    /// that the rank started if others are still awaited there, else it came after that.
    pub fn fail(&self, rank: usize, mut why: String) -> bool {
        let mut state = self.lock();
        let mut place = None;
        match state.ranks[rank].last {
            Some((id, last)) if state.incomplete(&id) => place = Some(last),
            Some((_, Place { group, op, sequence })) => {
                why.push_str(&format!(" (after {op} #{sequence} of {group})"));
            }
            None => {}
        }
        let first = state.failure.is_none();
        self.poison(&mut state, failure(rank, place, why));
        first
    }

    /// Says that `rank` will start nothing any more: whoever waits for it fails now.
    pub fn leave(&self, rank: usize) {
        let mut state = self.lock();
        state.ranks[rank].gone = true;
        let awaited =
            state.slots.values().filter(|slot| slot.missing().contains(&rank)).map(|slot| slot.place);
        if let Some(place) = awaited.min_by_key(|place| (place.group, place.sequence)) {
            self.poison(&mut state, failure(rank, Some(place), "it ended without joining".into()));
        }
    }

    /// Fails the world if some operation has been gathering for longer than the deadline: for ranks that do not wait
    /// here, since their devices do. A rank counts as waiting in every operation where it has arrived and others have
    /// not.
    pub fn check(&self) {
        let mut guard = self.lock();
        let state = &mut *guard;
        let now = Instant::now();
        let oldest = state.slots.iter().filter(|(_, slot)| matches!(slot.stage, Stage::Gathering(_)));
        let oldest = oldest.min_by_key(|(id, slot)| (slot.since, **id));
        let Some((&id, slot)) = oldest.filter(|(_, slot)| now.duration_since(slot.since) > self.deadline)
        else {
            return;
        };
        let Some(&first) = slot.arrived().first() else { return };
        let mut waiting = vec![Vec::new(); state.ranks.len()];
        for (&id, slot) in &state.slots {
            for rank in slot.arrived() {
                waiting[rank].push(id);
            }
        }
        for (rank, mut slots) in state.ranks.iter_mut().zip(waiting) {
            slots.sort_unstable();
            rank.waiting = slots;
        }
        let late = self.late(state, id, first);
        self.poison(state, late);
    }

    /// A party arrives with what it notes, gives, and where it takes.
    pub fn arrive(
        self: &Arc<Self>,
        seat: &Seat,
        note: J::Note,
        give: J::Give,
        take: J::Take,
    ) -> Result<Ticket<J>> {
        let (id, parties, index) = (seat.id(), seat.parties(), seat.index);
        let place = Place { group: J::group(&note), op: J::name(&note), sequence: seat.sequence };
        let mut guard = self.lock();
        let state = &mut *guard;
        if let Some(failure) = &state.failure {
            return Err(failure.clone());
        }
        state.arrivals += 1;
        let slot = state.slots.entry(id).or_insert_with(|| Slot {
            group: seat.group.clone(),
            lane: seat.lane,
            place,
            since: Instant::now(),
            stage: Stage::Gathering((0..parties).map(|_| None).collect()),
            staying: parties,
        });
        let rank = slot.world_rank(index);
        // What a rank was at is said by operations alone: groups are made in passing.
        if seat.lane != Lane::Founding {
            state.ranks[rank].last = Some((id, place));
        }
        let missing = {
            let seats = match &mut slot.stage {
                Stage::Gathering(seats) if seats[index].is_none() => seats,
                _ => {
                    let twice = failure(rank, Some(place), "it arrived twice".into());
                    return Err(self.poison(state, twice));
                }
            };
            let disagrees = seats.iter().enumerate().find_map(|(i, seat)| {
                let theirs = &seat.as_ref()?.note;
                (!J::agree((index, &note), (i, theirs))).then(|| (i, J::describe(theirs)))
            });
            if let Some((i, theirs)) = disagrees {
                let (mine, peer) = (J::describe(&note), slot.world_rank(i));
                let why = format!("mismatch: rank {rank} calls {mine}, rank {peer} calls {theirs}");
                return Err(self.poison(state, failure(rank, Some(place), why)));
            }
            seats[index] = Some(Party { note, give, take });
            seats.iter().filter(|seat| seat.is_none()).count()
        };
        if missing > 0 {
            let gone = slot.missing().into_iter().find(|&rank| state.ranks[rank].gone);
            if let Some(rank) = gone {
                let ended = failure(rank, Some(place), "it ended without joining".into());
                return Err(self.poison(state, ended));
            }
            drop(guard);
            return Ok(Ticket { board: self.clone(), id, index, rank });
        }
        let Stage::Gathering(seats) = std::mem::replace(&mut slot.stage, Stage::Done(Vec::new())) else {
            unreachable!("the stage was `Gathering` under the same lock")
        };
        let (mut sides, mut takes) = (Vec::with_capacity(parties), Vec::with_capacity(parties));
        for Party { note, give, take } in seats.into_iter().flatten() {
            sides.push((note, give));
            takes.push(Work::Open(take));
        }
        let job = Arc::new(J::join(sides));
        let small = job.is_small();
        slot.stage = Stage::Working { job, takes, unfinished: parties };
        if small {
            drop(self.work(guard, id, index, rank)?);
        } else {
            self.ring(state, id);
            drop(guard);
        }
        Ok(Ticket { board: self.clone(), id, index, rank })
    }

    /// Does open work of a slot until there is none.
    fn work<'a>(
        &'a self,
        mut guard: MutexGuard<'a, State<J>>,
        id: SlotId,
        index: usize,
        rank: usize,
    ) -> Result<MutexGuard<'a, State<J>>> {
        while let Some((job, mut claimed)) = guard.slots.get_mut(&id).and_then(|slot| slot.claim(index)) {
            drop(guard);
            let outcome = claimed.iter_mut().try_for_each(|(i, take)| job.fill(*i, take));
            // Before the slot can be done: then nobody holds what was sent.
            drop(job);
            guard = self.lock();
            if let Some(failure) = &guard.failure {
                return Err(failure.clone());
            }
            let state = &mut *guard;
            let Some(slot) = state.slots.get_mut(&id) else { break };
            if let Err(error) = outcome {
                let failed = failure(rank, Some(slot.place), error.to_string());
                return Err(self.poison(state, failed));
            }
            if slot.finish(claimed) {
                self.ring(state, id);
            }
        }
        Ok(guard)
    }

    /// Wakes the parties that wait in a slot.
    fn ring(&self, state: &State<J>, id: SlotId) {
        let Some(slot) = state.slots.get(&id) else { return };
        for rank in slot.members() {
            if state.ranks[rank].waiting.contains(&id) {
                self.bells[rank].notify_all();
            }
        }
    }

    /// Records a failure unless there was one, ends everything, and returns the first failure.
    fn poison(&self, state: &mut State<J>, failure: Error) -> Error {
        let first = state.failure.get_or_insert(failure).clone();
        state.slots.clear();
        for bell in &self.bells {
            bell.notify_all();
        }
        first
    }

    fn wait(&self, id: SlotId, index: usize, rank: usize) -> Result<J::Take> {
        // A deadline beyond the end of the clock is none.
        let until = Instant::now().checked_add(self.deadline);
        let mut guard = self.lock();
        loop {
            if let Some(failure) = &guard.failure {
                return Err(failure.clone());
            }
            guard = self.work(guard, id, index, rank)?;
            if let Some(Stage::Done(takes)) = guard.slots.get_mut(&id).map(|slot| &mut slot.stage)
                && let Some(take) = takes[index].take()
            {
                return Ok(take);
            }
            // When all have arrived nobody is late: others do what is left, and ring when it is done.
            let left = match until {
                Some(until) if guard.incomplete(&id) => until.saturating_duration_since(Instant::now()),
                _ => Duration::MAX,
            };
            if left.is_zero() {
                guard.ranks[rank].waiting.push(id);
                let late = self.late(&guard, id, rank);
                return Err(self.poison(&mut guard, late));
            }
            guard.ranks[rank].waiting.push(id);
            guard = self.bells[rank].wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0;
            let waiting = &mut guard.ranks[rank].waiting;
            if let Some(at) = waiting.iter().position(|&slot| slot == id) {
                waiting.swap_remove(at);
            }
        }
    }

    fn late(&self, state: &State<J>, id: SlotId, rank: usize) -> Error {
        let deadline = self.deadline;
        match state.culprits(id) {
            Some((place, late)) => {
                let why = format!("ranks {late:?} did not arrive within {deadline:?}");
                failure(late[0], Some(place), why)
            }
            None => {
                let place = state.slots.get(&id).map(|slot| slot.place);
                failure(rank, place, format!("deadlock for {deadline:?}: {}", state.waits()))
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<J>> {
        // Code under the lock does not panic half-way through a change; a poisoned lock is still consistent.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A party's claim on the result of an operation. Dropping it gives the result up; the operation goes on.
pub struct Ticket<J: Job> {
    board: Arc<Board<J>>,
    id: SlotId,
    index: usize,
    rank: usize,
}

impl<J: Job> Ticket<J> {
    /// Whether the operation is done; does open work of it.
    pub fn ready(&self) -> Result<bool> {
        let guard = self.board.lock();
        if let Some(failure) = &guard.failure {
            return Err(failure.clone());
        }
        let guard = self.board.work(guard, self.id, self.index, self.rank)?;
        Ok(guard.slots.get(&self.id).is_some_and(|slot| matches!(slot.stage, Stage::Done(_))))
    }

    /// Waits for the result.
    pub fn wait(self) -> Result<J::Take> {
        self.board.wait(self.id, self.index, self.rank)
    }
}

impl<J: Job> Drop for Ticket<J> {
    fn drop(&mut self) {
        let mut state = self.board.lock();
        let Some(slot) = state.slots.get_mut(&self.id) else { return };
        slot.staying -= 1;
        if slot.staying == 0 {
            // Results that nobody wanted may be large: free them outside of the lock.
            let abandoned = state.slots.remove(&self.id);
            drop(state);
            drop(abandoned);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::thread;

    use moe_topology::Attention;

    use super::*;

    /// Work that says when it has begun, and ends when it is told to.
    struct Slow(Vec<(Sender<()>, Mutex<Receiver<()>>)>);

    impl Job for Slow {
        type Note = ();
        type Give = (Sender<()>, Mutex<Receiver<()>>);
        type Take = ();

        fn group(_: &()) -> GroupKey {
            Attention::ALL.into()
        }
        fn name(_: &()) -> &'static str {
            "slow"
        }
        fn agree(_: (usize, &()), _: (usize, &())) -> bool {
            true
        }
        fn describe(_: &()) -> String {
            String::new()
        }
        fn join(parties: Vec<((), Self::Give)>) -> Self {
            Slow(parties.into_iter().map(|(_, give)| give).collect())
        }
        fn is_small(&self) -> bool {
            true
        }
        fn fill(&self, index: usize, _: &mut ()) -> Result<()> {
            let (begun, go_on) = &self.0[index];
            begun.send(()).unwrap();
            go_on.lock().unwrap().recv().unwrap();
            Ok(())
        }
    }

    /// The deadline has passed when the wait begins, and yet nobody is late.
    #[test]
    fn work_under_way_is_waited_for_beyond_the_deadline() {
        let board = Arc::new(Board::<Slow>::new(2, Duration::ZERO));
        let group = Arc::new(Members { id: 0, ranks: [0, 1].into() });
        let seat = |index| Seat { group: group.clone(), lane: Lane::All, sequence: 0, index };
        let (begun, has_begun) = channel();
        let (go_on, told) = channel();
        let first = board.arrive(&seat(0), (), (begun.clone(), Mutex::new(told)), ()).unwrap();
        let (go_on_too, told) = channel();
        let worker = thread::spawn({
            let (board, seat) = (board.clone(), seat(1));
            move || board.arrive(&seat, (), (begun, Mutex::new(told)), ()).unwrap().wait()
        });
        has_begun.recv().unwrap();
        let waiter = thread::spawn(move || first.wait());
        while board.lock().ranks[0].waiting.is_empty() && !waiter.is_finished() {
            thread::yield_now();
        }
        go_on.send(()).unwrap();
        go_on_too.send(()).unwrap();
        assert_eq!(waiter.join().unwrap(), Ok(()));
        assert_eq!(worker.join().unwrap(), Ok(()));
    }
}
