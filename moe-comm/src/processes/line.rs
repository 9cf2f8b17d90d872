//! A rank's line to the hub.

use std::collections::HashMap;
use std::fmt;
use std::net::{Shutdown, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, ThreadId};
use std::time::Duration;

use moe_topology::GroupKey;

use super::connect::connect;
use super::frame::{self, OFFER};
use super::wire::{Step, ToHub, ToLine};
use super::{BEAT, rendezvous, spawn};
use crate::board::Lane;
use crate::raw::position;
use crate::{Error, Result, Signature};

/// A group of a world of processes, the same number on all of its ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GroupId(u64);

/// One rank of a world of processes: its line to the [`Hub`](super::Hub).
///
/// A handle: clones are the same rank. When the last one goes the rank has left, and whoever still waits for it is told;
/// a process that ends before that, with `std::process::exit` too, is the world's failure.
///
/// Every rank makes the same calls of [`barrier`](Self::barrier) and [`share`](Self::share) in the same order.
#[derive(Clone)]
pub struct Process(Arc<Handle>);

struct Handle {
    line: Arc<Line>,
    mail: Sender<Option<ToHub>>,
    stream: Arc<TcpStream>,
    reader: ThreadId,
    /// Ends with the thread that reads.
    ended: Mutex<Receiver<()>>,
}

/// What the threads of a line share.
struct Line {
    hub: String,
    rank: usize,
    size: usize,
    deadline: Duration,
    failure: OnceLock<Error>,
    state: Mutex<State>,
    bell: Condvar,
}

type Callback = Box<dyn FnOnce(&Error) + Send>;

#[derive(Default)]
struct State {
    /// What was asked, by number; `Some` when all have arrived.
    answers: HashMap<u64, Option<Answer>>,
    asked: u64,
    callbacks: Vec<Callback>,
    leaving: bool,
}

struct Answer {
    group: u64,
    bytes: Arc<[u8]>,
}

impl Process {
    /// Joins the world of `size` ranks that meets at `hub` (`host:port`), as `rank`. Returns when all have come.
    ///
    /// `deadline` is how long ranks wait for each other, here and later; that of the hub is the same. A hub that does
    /// not listen yet is awaited for as long.
    ///
    /// # Errors
    /// [`Error::Rendezvous`] if the hub cannot be reached, or refuses: the rank has come before, or the hub has another
    /// size, deadline or version. [`Error::Poisoned`] if others do not come, or the world has failed.
    /// [`Error::Argument`] if `rank` is not below `size`.
    pub fn join(hub: &str, rank: usize, size: usize, deadline: Duration) -> Result<Process> {
        if rank >= size {
            return Err(Error::Argument { op: "join", what: format!("there is no rank {rank} of {size}") });
        }
        let stream = Arc::new(connect(hub, rank, size, deadline)?);
        let line = Arc::new(Line {
            hub: hub.into(),
            rank,
            size,
            deadline,
            failure: OnceLock::new(),
            state: Mutex::default(),
            bell: Condvar::new(),
        });
        let (mail, outgoing) = mpsc::channel();
        let writing = stream.clone();
        spawn(format!("rank {rank} to hub"), move || {
            frame::pump(&outgoing, &writing, BEAT, &ToHub::Ping);
        })?;
        let (alive, ended) = mpsc::channel();
        let (hearing, reading) = (line.clone(), stream.clone());
        let reader = spawn(format!("rank {rank} from hub"), move || {
            hearing.listen(&reading);
            drop(alive);
        })?;
        let reader = reader.thread().id();
        let process = Process(Arc::new(Handle { line, mail, stream, reader, ended: Mutex::new(ended) }));
        process.step(Step::Join, None)?;
        Ok(process)
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.line().rank
    }

    /// Ranks of the world.
    pub fn size(&self) -> usize {
        self.line().size
    }

    /// How long ranks wait for each other.
    pub fn deadline(&self) -> Duration {
        self.line().deadline
    }

    /// Waits until all ranks of the world have called it.
    ///
    /// # Errors
    /// The world's failure, as [`failure`](Self::failure) says.
    pub fn barrier(&self) -> Result<()> {
        self.step(Step::Barrier, None).map(drop)
    }

    /// Gives the bytes of rank 0, which alone has some, to all.
    ///
    /// # Errors
    /// The world's failure. [`Error::Argument`], before anything is sent, if this is rank 0 and it gives nothing, or
    /// another and it gives something, or if it is more than a mebibyte.
    pub fn share(&self, bytes: Option<&[u8]>) -> Result<Vec<u8>> {
        if bytes.is_some() != (self.rank() == 0) {
            let what = format!("rank 0 gives the bytes, and nobody else; this is rank {}", self.rank());
            return Err(Error::Argument { op: "share", what });
        }
        offered("share", bytes)?;
        self.step(Step::Share, bytes.map(Arc::from)).map(|bytes| bytes.to_vec())
    }

    /// Fails the world for the reason `why`, and returns the world's first failure, which may be another one. Waits
    /// for the hub to say which, if that is quick.
    pub fn fail(&self, why: &str) -> Error {
        let line = self.line();
        self.send(ToHub::Fail { why: why.into() });
        let patience = line.deadline.min(PATIENCE);
        let waited = line.bell.wait_timeout_while(line.lock(), patience, |_| line.failure.get().is_none());
        drop(waited);
        let own = Error::Poisoned { rank: line.rank, group: None, op: None, sequence: None, why: why.into() };
        line.fail(own)
    }

    /// The world's first failure, as far as this rank has heard: [`Error::Poisoned`] of the rank that failed, or
    /// [`Error::Rendezvous`] when the hub is gone.
    pub fn failure(&self) -> Option<Error> {
        self.line().failure.get().cloned()
    }

    /// Calls `f` once when the world fails: on the thread that hears it, which it must not keep; or here and now if
    /// the world has failed. Never if this rank leaves before. What `f` owns must not be a `Process`: the rank would
    /// not leave.
    pub fn on_failure(&self, f: impl FnOnce(&Error) + Send + 'static) {
        let line = self.line();
        let mut state = line.lock();
        match line.failure.get() {
            None => state.callbacks.push(Box::new(f)),
            Some(failure) => {
                drop(state);
                f(failure);
            }
        }
    }

    /// Makes a group of `ranks` (world ranks, in group order), which are all called to it: waits until all of them
    /// have made the same call, with the same ranks and for the same time. The first rank of them that offers bytes
    /// gives them to all. Groups that the same ranks make again are other groups. What ranks of a group make `within`
    /// it is counted apart: its order and that of other groups do not matter.
    ///
    /// # Errors
    /// [`Error::BadGroup`] as [`World::communicator`](crate::World::communicator), [`Error::Argument`] of an offer of
    /// more than a mebibyte, or the world's failure.
    pub fn meet(
        &self,
        key: GroupKey,
        within: Option<GroupId>,
        ranks: &[usize],
        offer: Option<Vec<u8>>,
    ) -> Result<(GroupId, Vec<u8>)> {
        position(key, ranks, self.rank(), self.size())?;
        offered("communicator", offer.as_deref())?;
        let (within, offer) = (within.map(|GroupId(id)| id), offer.map(Arc::from));
        let ask = self.ask(|answer| ToHub::Meet { key, within, ranks: ranks.into(), offer, answer })?;
        let Answer { group, bytes } = ask.wait()?;
        Ok((GroupId(group), bytes.to_vec()))
    }

    /// Says that this rank has started an operation of a group, without waiting: which of the group's ranks meet in
    /// it (`lane`), the number of the operation in that lane, from 0, which party this rank is there (its position in
    /// the group, or 0 for the sender and 1 for the receiver of a message), and the call that the others are compared
    /// with.
    ///
    /// # Errors
    /// The world's failure, if it has been heard of. That this call is one shows later.
    pub fn arrive(
        &self,
        group: GroupId,
        lane: Lane,
        sequence: u64,
        index: usize,
        signature: &Signature,
    ) -> Result<()> {
        self.alive()?;
        self.send(arrival(group, lane, sequence, index, signature, None));
        Ok(())
    }

    /// Like [`arrive`](Self::arrive), to be told when all parties have arrived.
    ///
    /// # Errors
    /// As [`arrive`](Self::arrive).
    pub fn arrive_and_wait(
        &self,
        group: GroupId,
        lane: Lane,
        sequence: u64,
        index: usize,
        signature: &Signature,
    ) -> Result<Arrival> {
        self.ask(|answer| arrival(group, lane, sequence, index, signature, Some(answer))).map(Arrival)
    }

    fn line(&self) -> &Arc<Line> {
        &self.0.line
    }

    fn alive(&self) -> Result<()> {
        self.line().failure.get().map_or(Ok(()), |failure| Err(failure.clone()))
    }

    fn send(&self, message: ToHub) {
        // A connection that has ended is the reader's to report.
        let _ = self.0.mail.send(Some(message));
    }

    fn step(&self, step: Step, offer: Option<Arc<[u8]>>) -> Result<Arc<[u8]>> {
        Ok(self.ask(|answer| ToHub::Step { step, offer, answer })?.wait()?.bytes)
    }

    fn ask(&self, message: impl FnOnce(u64) -> ToHub) -> Result<Ask> {
        self.alive()?;
        let mut state = self.line().lock();
        let answer = state.asked;
        state.asked += 1;
        state.answers.insert(answer, None);
        drop(state);
        self.send(message(answer));
        Ok(Ask { process: self.clone(), answer })
    }
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Line { rank, size, hub, .. } = &**self.line();
        write!(f, "Process({rank} of {size} at {hub})")
    }
}

/// How long a rank that fails or leaves waits for the hub's word.
const PATIENCE: Duration = Duration::from_secs(10);

fn offered(op: &'static str, bytes: Option<&[u8]>) -> Result<()> {
    match bytes.map_or(0, <[u8]>::len) {
        len if len > OFFER => {
            Err(Error::Argument { op, what: format!("{len} bytes, where at most {OFFER} are legal") })
        }
        _ => Ok(()),
    }
}

fn arrival(
    group: GroupId,
    lane: Lane,
    sequence: u64,
    index: usize,
    signature: &Signature,
    answer: Option<u64>,
) -> ToHub {
    ToHub::Arrive { group: group.0, lane, sequence, index, signature: signature.clone(), answer }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let mut state = self.line.lock();
        state.leaving = true;
        let callbacks = std::mem::take(&mut state.callbacks);
        drop(state);
        drop(callbacks);
        let _ = self.mail.send(Some(ToHub::Goodbye));
        let _ = self.mail.send(None);
        if thread::current().id() != self.reader {
            // The hub ends the connection when it has heard the goodbye, which a process that exits now would lose.
            let ended = self.ended.get_mut().unwrap_or_else(PoisonError::into_inner);
            let _ = ended.recv_timeout(self.line.deadline.min(PATIENCE));
        }
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

impl Line {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hears the hub until the connection ends.
    fn listen(&self, stream: &TcpStream) {
        let (mut from, mut buffer) = (stream, Vec::new());
        loop {
            match frame::read(&mut from, &mut buffer, frame::limit(self.size)) {
                Ok(Some(ToLine::Done { answer, group, bytes })) => {
                    if let Some(asked) = self.lock().answers.get_mut(&answer) {
                        *asked = Some(Answer { group, bytes });
                        self.bell.notify_all();
                    }
                }
                Ok(Some(ToLine::Failed(failure))) => {
                    self.fail(failure);
                }
                Ok(Some(ToLine::Ping)) => {}
                Ok(Some(ToLine::Welcome | ToLine::Refused { .. }) | None) | Err(_) => break,
            }
        }
        if !self.lock().leaving {
            self.fail(rendezvous(format!("the hub at {} is gone", self.hub)));
        }
        // Ends the thread that writes, too.
        let _ = stream.shutdown(Shutdown::Both);
    }

    /// Keeps a failure unless there was one, tells everyone of it, and returns the first.
    fn fail(&self, failure: Error) -> Error {
        let mut state = self.lock();
        let first = self.failure.get_or_init(|| failure).clone();
        let callbacks = std::mem::take(&mut state.callbacks);
        self.bell.notify_all();
        drop(state);
        for callback in callbacks {
            // One that panics keeps neither the others nor the line from going on.
            let _ = catch_unwind(AssertUnwindSafe(|| callback(&first)));
        }
        first
    }
}

/// What this rank wants to hear of.
struct Ask {
    process: Process,
    answer: u64,
}

impl Ask {
    fn ready(&self) -> Result<bool> {
        self.process.alive()?;
        Ok(self.process.line().lock().answers.get(&self.answer).is_some_and(Option::is_some))
    }

    /// Waits for the hub: it answers by the deadline, or the connection ends.
    fn wait(self) -> Result<Answer> {
        let line = self.process.line();
        let mut state = line.lock();
        loop {
            self.process.alive()?;
            if let Some(answer) = state.answers.get_mut(&self.answer).and_then(Option::take) {
                return Ok(answer);
            }
            state = line.bell.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Ask {
    fn drop(&mut self) {
        self.process.line().lock().answers.remove(&self.answer);
    }
}

/// An operation that this rank has started and may wait for. Dropping it gives that up; the operation goes on.
pub struct Arrival(Ask);

impl Arrival {
    /// Whether all parties have arrived.
    ///
    /// # Errors
    /// The world's failure.
    pub fn ready(&self) -> Result<bool> {
        self.0.ready()
    }

    /// Waits until all parties have arrived.
    ///
    /// # Errors
    /// The world's failure.
    pub fn wait(self) -> Result<()> {
        self.0.wait().map(drop)
    }
}

impl fmt::Debug for Arrival {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Arrival({} of {:?})", self.0.answer, self.0.process)
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::super::{Hub, silence};
    use super::*;

    /// Its process has stopped, or its machine is gone: the connection does not end.
    #[test]
    fn a_hub_that_falls_silent_is_gone() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let silent = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            frame::write(&mut &stream, &ToLine::Welcome, &mut Vec::new()).unwrap();
            stream
        });
        let failure = Process::join(&address, 0, 1, Duration::from_millis(50)).unwrap_err();
        assert_eq!(failure, rendezvous(format!("the hub at {address} is gone")));
        drop(silent.join().unwrap());
    }

    #[test]
    fn a_line_with_nothing_to_say_is_kept() {
        let deadline = Duration::from_millis(50);
        let hub = Hub::listen("127.0.0.1:0", 1, deadline).unwrap();
        let process = Process::join(&hub.address().to_string(), 0, 1, deadline).unwrap();
        thread::sleep(silence(deadline) + BEAT);
        assert_eq!(process.barrier(), Ok(()));
    }
}
