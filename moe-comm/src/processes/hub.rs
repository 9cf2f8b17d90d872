//! The server where the processes of a world meet.

use std::collections::HashMap;
use std::fmt;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use moe_topology::{Attention, GroupKey};

use super::frame;
use super::meeting::{Give, Meeting, Note};
use super::wire::{MEET, Step, ToHub, ToLine, VERSION};
use super::{BEAT, GRACE, rendezvous, silence, spawn};
use crate::Error;
use crate::board::{Board, Lane, Members, Seat};

/// The number of the group of all ranks, whose operations are the steps.
const WORLD: u64 = 0;
/// The most bytes of a greeting.
const HELLO: usize = 4096;
/// How long one that has connected may take to say who it is.
const GREETING: Duration = Duration::from_secs(10);

/// Where the processes of a world meet: a TCP server on threads of the process that made it.
///
/// It compares what the ranks say that they start, reports who does not, and keeps the world's first failure. When it
/// is dropped, or its process ends, the world cannot go on: its ranks fail with the hub's address.
pub struct Hub {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepter: Option<JoinHandle<()>>,
    /// The timer runs until this is gone.
    _timer: Sender<()>,
}

/// What the threads of a hub share.
struct Shared {
    board: Arc<Board<Meeting>>,
    size: usize,
    groups: Mutex<Groups>,
    lines: Mutex<Lines>,
    /// A session has ended.
    bell: Condvar,
}

/// The groups by number. The first is the world.
struct Groups {
    made: Vec<Arc<Members>>,
    named: HashMap<GroupName, usize>,
}

/// The group within which a group was made, its ranks, and how many times these had made a group there before.
type GroupName = (Option<u64>, Arc<[usize]>, u64);

struct Lines {
    /// The ranks that are there.
    ranks: Vec<Option<Line>>,
    /// Those that have come, also if they have left.
    come: Vec<bool>,
    /// Sessions that have not ended.
    open: usize,
    /// The ranks have been told of the world's failure.
    told: bool,
    closed: bool,
}

struct Line {
    mail: Sender<Option<ToLine>>,
    stream: Arc<TcpStream>,
}

impl Hub {
    /// Listens at `address` (`host:port`; port 0 takes a free one) for the ranks of a world of `size`, which wait for
    /// each other for at most `deadline`.
    ///
    /// # Errors
    /// [`Error::Rendezvous`] if nobody can listen there; [`Error::Argument`] of a world without ranks.
    pub fn listen(address: &str, size: usize, deadline: Duration) -> crate::Result<Hub> {
        if size == 0 {
            return Err(Error::Argument { op: "listen", what: "a world of 0 ranks".into() });
        }
        let fail = |error| rendezvous(format!("there can be no hub at {address}: {error}"));
        let listener = TcpListener::bind(address).map_err(fail)?;
        let address = listener.local_addr().map_err(fail)?;
        let world = Arc::new(Members { id: 0, ranks: (0..size).collect() });
        let shared = Arc::new(Shared {
            board: Arc::new(Board::new(size, deadline)),
            size,
            groups: Mutex::new(Groups { made: vec![world], named: HashMap::new() }),
            lines: Mutex::new(Lines {
                ranks: (0..size).map(|_| None).collect(),
                come: vec![false; size],
                open: 0,
                told: false,
                closed: false,
            }),
            bell: Condvar::new(),
        });
        let (timer, stopped) = mpsc::channel();
        let timed = shared.clone();
        spawn("hub timer".into(), move || {
            let tick = (deadline / 4).clamp(Duration::from_millis(1), Duration::from_secs(1));
            while stopped.recv_timeout(tick) == Err(RecvTimeoutError::Timeout) {
                timed.board.check();
                timed.announce();
            }
        })?;
        let serving = shared.clone();
        let accepter = spawn("hub".into(), move || serving.accept(&listener))?;
        Ok(Hub { address, shared, accepter: Some(accepter), _timer: timer })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The world's first failure.
    pub fn failure(&self) -> Option<Error> {
        self.shared.board.failure()
    }

    /// Waits until every rank that has come has ended its connection, for at most the deadline, and stops: for a hub
    /// in the process of a rank, whose work may be done before that of others.
    pub fn close(self) {
        self.shared.emptied(self.shared.board.deadline());
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        let mut lines = self.shared.lock();
        lines.closed = true;
        for line in lines.ranks.iter().flatten() {
            let _ = line.mail.send(None);
        }
        drop(lines);
        // Wakes the thread that accepts.
        let woken = TcpStream::connect_timeout(&reachable(self.address), GRACE).is_ok();
        if let Some(accepter) = self.accepter.take()
            && woken
        {
            let _ = accepter.join();
        }
        self.shared.emptied(GRACE);
        for line in self.shared.lock().ranks.iter().flatten() {
            let _ = line.stream.shutdown(Shutdown::Both);
        }
    }
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hub({} for {} ranks)", self.address, self.shared.size)
    }
}

/// An address of this machine at which a listener at `address` is reached.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(match address.ip() {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    address
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until no session is open.
    fn emptied(&self, patience: Duration) {
        // Whatever the outcome, the caller goes on.
        let _ = self.bell.wait_timeout_while(self.lock(), patience, |lines| lines.open > 0);
    }

    fn accept(self: Arc<Self>, listener: &TcpListener) {
        loop {
            let accepted = listener.accept();
            if self.lock().closed {
                return;
            }
            let started = accepted.map_err(|error| error.to_string()).and_then(|(stream, _)| {
                let shared = self.clone();
                spawn("hub session".into(), move || shared.serve(Arc::new(stream))).map_err(|e| e.to_string())
            });
            if started.is_err() {
                // Out of files or threads: the rank tries again, or is missed at the deadline.
                thread::sleep(Duration::from_millis(50));
            }
        }
    }

    /// Sends the world's failure to all ranks, once.
    fn announce(&self) {
        let Some(failure) = self.board.failure() else { return };
        let mut lines = self.lock();
        if !std::mem::replace(&mut lines.told, true) {
            for line in lines.ranks.iter().flatten() {
                let _ = line.mail.send(Some(ToLine::Failed(failure.clone())));
            }
        }
    }

    /// All of one connection.
    fn serve(&self, stream: Arc<TcpStream>) {
        let _ = stream.set_nodelay(true);
        match self.greet(&stream) {
            Ok(guest) => self.session(guest, &stream),
            Err(what) => refuse(&stream, what),
        }
    }

    /// Who it is; refused if it cannot be a rank of this world.
    fn greet(&self, stream: &Arc<TcpStream>) -> Result<Guest, String> {
        stream.set_read_timeout(Some(GREETING)).map_err(|error| error.to_string())?;
        let first = frame::read(&mut &**stream, &mut Vec::new(), HELLO);
        let Some(ToHub::Hello { version, rank, size, deadline }) = first.map_err(|e| e.to_string())? else {
            return Err("a rank says first who it is".into());
        };
        let mine = self.board.deadline();
        if version != VERSION {
            return Err(format!("rank {rank} is of version {version}, the hub of {VERSION}"));
        }
        if size != self.size || rank >= size {
            return Err(format!("rank {rank} of {size} is none of the hub's {} ranks", self.size));
        }
        if deadline != mine {
            return Err(format!("rank {rank} has a deadline of {deadline:?}, the hub of {mine:?}"));
        }
        stream.set_read_timeout(Some(silence(mine))).map_err(|error| error.to_string())?;
        let (mail, outgoing) = mpsc::channel();
        let mut lines = self.lock();
        if lines.closed {
            return Err("the hub has stopped".into());
        }
        if lines.come[rank] {
            return Err(format!("rank {rank} has come before"));
        }
        let writing = stream.clone();
        let (pumping, pumped) = mpsc::channel();
        spawn(format!("hub to rank {rank}"), move || {
            frame::pump(&outgoing, &writing, BEAT, &ToLine::Ping);
            drop(pumping);
        })
        .map_err(|error| error.to_string())?;
        let _ = mail.send(Some(ToLine::Welcome));
        if let (true, Some(failure)) = (lines.told, self.board.failure()) {
            let _ = mail.send(Some(ToLine::Failed(failure)));
        }
        lines.ranks[rank] = Some(Line { mail: mail.clone(), stream: stream.clone() });
        lines.come[rank] = true;
        lines.open += 1;
        Ok(Guest { rank, mail, pumped })
    }

    /// Hears a rank out until it says goodbye, or its connection ends.
    fn session(&self, Guest { rank, mail, pumped }: Guest, stream: &TcpStream) {
        let mut session = Session { shared: self, rank, mail, steps: 0, made: HashMap::new() };
        match session.listen(stream) {
            Ok(()) => self.board.leave(rank),
            Err(why) => {
                self.board.fail(rank, why);
            }
        }
        self.announce();
        let _ = session.mail.send(None);
        // What it was sent reaches it, unless it takes nothing any more.
        let _ = pumped.recv_timeout(GRACE);
        let _ = stream.shutdown(Shutdown::Both);
        let mut lines = self.lock();
        lines.ranks[rank] = None;
        lines.open -= 1;
        drop(lines);
        self.bell.notify_all();
    }

    fn found(&self, name: GroupName) -> Arc<Members> {
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        let Groups { made, named } = &mut *groups;
        let id = *named.entry(name).or_insert_with_key(|(_, ranks, _)| {
            let id = made.len();
            made.push(Arc::new(Members { id, ranks: ranks.iter().copied().collect() }));
            id
        });
        made[id].clone()
    }

    fn group(&self, id: u64) -> Option<Arc<Members>> {
        let groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        groups.made.get(usize::try_from(id).ok()?).cloned()
    }
}

/// A rank that has been welcomed.
struct Guest {
    rank: usize,
    mail: Sender<Option<ToLine>>,
    /// Ends when the rank has been sent all that it will be.
    pumped: Receiver<()>,
}

/// Says why a connection is not for this hub, and lets the other side read it.
fn refuse(stream: &TcpStream, what: String) {
    let mut stream = stream;
    if frame::write(&mut stream, &ToLine::Refused { what }, &mut Vec::new()).is_ok() {
        let _ = stream.shutdown(Shutdown::Write);
        let _ = stream.set_read_timeout(Some(GRACE));
        let mut rest = [0; 4096];
        // Bounded: a stranger may go on for ever.
        for _ in 0..64 {
            if !matches!(stream.read(&mut rest), Ok(1..)) {
                break;
            }
        }
    }
}

/// What the hub knows of one rank.
struct Session<'a> {
    shared: &'a Shared,
    rank: usize,
    mail: Sender<Option<ToLine>>,
    /// Steps of the world that it has taken.
    steps: u64,
    /// How many times it has made a group of these ranks, within another or not.
    made: HashMap<(Option<u64>, Arc<[usize]>), u64>,
}

impl Session<'_> {
    /// Until the rank says goodbye; an error says why it cannot go on.
    fn listen(&mut self, mut stream: &TcpStream) -> Result<(), String> {
        let mut buffer = Vec::new();
        loop {
            let message = match frame::read(&mut stream, &mut buffer, frame::limit(self.shared.size)) {
                Ok(Some(message)) => message,
                Ok(None) => return Err("its process ended".into()),
                Err(error) => return Err(lost(&error)),
            };
            match message {
                ToHub::Goodbye => return Ok(()),
                ToHub::Ping => {}
                ToHub::Fail { why } => {
                    self.shared.board.fail(self.rank, why);
                    self.shared.announce();
                }
                message => {
                    let (seat, note, give) = self.understand(message).map_err(nonsense)?;
                    // The ticket goes at once: nobody waits on the board.
                    if self.shared.board.arrive(&seat, note, give, ()).is_err() {
                        self.shared.announce();
                    }
                }
            }
        }
    }

    /// What a rank starts, once it is clear that it could.
    fn understand(&mut self, message: ToHub) -> Result<(Seat, Note, Give), &'static str> {
        let answer = |answer| (self.mail.clone(), answer);
        match message {
            ToHub::Step { step, offer, answer: number } => {
                let group = self.shared.group(WORLD).ok_or("there is no world")?;
                let (lane, sequence) = match step {
                    Step::Join => (Lane::Founding, 0),
                    Step::Barrier | Step::Share => (Lane::All, self.steps),
                };
                self.steps += u64::from(step != Step::Join);
                let seat = Seat { group, lane, sequence, index: self.rank };
                let note = Note::Step(world(), step.name());
                Ok((seat, note, Give { group: WORLD, offer, answer: Some(answer(number)) }))
            }
            ToHub::Meet { key, within, ranks, offer, answer: number } => {
                let mut sorted = ranks.to_vec();
                sorted.sort_unstable();
                let distinct = sorted.windows(2).all(|pair| pair[0] < pair[1]);
                let index = ranks.iter().position(|&rank| rank == self.rank);
                let (true, Some(index)) = (distinct && sorted.last() < Some(&self.shared.size), index) else {
                    return Err("ranks that form no group with it");
                };
                let times = self.made.entry((within, ranks.clone())).or_default();
                let (group, sequence) = (self.shared.found((within, ranks, *times)), *times);
                *times += 1;
                let id = group.id as u64;
                let answer = Some((self.mail.clone(), number));
                let seat = Seat { group, lane: Lane::Founding, sequence, index };
                Ok((seat, Note::Step(key, MEET), Give { group: id, offer, answer }))
            }
            ToHub::Arrive { group: id, lane, sequence, index, signature, answer: number } => {
                let group = self.shared.group(id).ok_or("a group that nobody made")?;
                let seat = Seat { group, lane, sequence, index };
                if id == WORLD || lane == Lane::Founding || seat.world_rank() != Some(self.rank) {
                    return Err("a seat that is not its own");
                }
                Ok((seat, Note::Call(signature), Give { group: id, offer: None, answer: number.map(answer) }))
            }
            ToHub::Hello { .. } | ToHub::Fail { .. } | ToHub::Goodbye | ToHub::Ping => {
                Err("a second greeting")
            }
        }
    }
}

/// What reports call the group of the whole world.
fn world() -> GroupKey {
    Attention::ALL.into()
}

fn nonsense(what: &'static str) -> String {
    format!("it does not speak as a rank does: {what}")
}

/// Why a connection can be read no further.
fn lost(error: &std::io::Error) -> String {
    use std::io::ErrorKind::*;
    match error.kind() {
        InvalidData => format!("it does not speak as a rank does: {error}"),
        WouldBlock | TimedOut => "its process does not answer".into(),
        _ => "its process ended".into(),
    }
}

#[cfg(test)]
mod tests {
    use moe_kernels::DType;

    use super::super::Process;
    use super::*;
    use crate::{Collective, Reduction, Signature};

    const LONG: Duration = Duration::from_secs(60);

    fn signature(elements: usize) -> Signature {
        let op = Collective::AllReduce(Reduction::Sum);
        Signature { group: Attention::TP.into(), op, dtype: DType::F32, elements, cols: 1 }
    }

    #[test]
    fn the_board_is_empty_after_many_operations() {
        let hub = Hub::listen("127.0.0.1:0", 4, LONG).unwrap();
        let address = hub.address().to_string();
        let ranks = [0, 1, 2, 3].map(|rank| {
            let address = address.clone();
            thread::spawn(move || {
                let process = Process::join(&address, rank, 4, LONG)?;
                let (group, _) = process.meet(Attention::TP.into(), None, &[3, 1, 0, 2], None)?;
                let index = [2, 1, 3, 0][rank];
                for sequence in 0..20_000 {
                    process.arrive(group, Lane::All, sequence, index, &signature(sequence as usize))?;
                }
                process.barrier()
            })
        });
        for rank in ranks {
            assert_eq!(rank.join().unwrap(), Ok(()));
        }
        // Each rank had left before its thread ended.
        assert_eq!(hub.shared.board.slots(), 0);
        assert_eq!(hub.shared.board.arrivals(), 4 * (1 + 1 + 20_000 + 1));
        assert_eq!(hub.failure(), None);
    }

    /// What a rank sends after its greeting, and what the world then fails with.
    fn failure_of(send: impl FnOnce(&mut &TcpStream)) -> String {
        let hub = Hub::listen("127.0.0.1:0", 2, LONG).unwrap();
        let stream = TcpStream::connect(hub.address()).unwrap();
        let (mut to, mut from, mut buffer) = (&stream, &stream, Vec::new());
        let hello = ToHub::Hello { version: VERSION.into(), rank: 1, size: 2, deadline: LONG };
        frame::write(&mut to, &hello, &mut buffer).unwrap();
        send(&mut to);
        loop {
            match frame::read(&mut from, &mut buffer, frame::limit(2)).unwrap() {
                Some(ToLine::Failed(failure)) => return failure.to_string(),
                Some(ToLine::Welcome | ToLine::Ping | ToLine::Done { .. }) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_rank_that_talks_nonsense_fails_the_world() {
        use std::io::Write;
        let cases: [&[u8]; 4] =
            [&[1, 0, 0, 0, 99], &[1, 0, 0, 0, 3], &[2, 0, 0, 0, 5, 5], &[0xff, 0xff, 0xff, 0xff]];
        for bytes in cases {
            let failure = failure_of(|to| to.write_all(bytes).unwrap());
            assert!(failure.starts_with("rank 1 failed: it does not speak as a rank does: "), "{failure}");
        }
    }

    #[test]
    fn a_rank_cannot_start_what_is_not_its_own() {
        let arrive = |group, lane, index| ToHub::Arrive {
            group,
            lane,
            sequence: 0,
            index,
            signature: signature(1),
            answer: None,
        };
        let meet = |ranks: &[usize]| ToHub::Meet {
            key: world(),
            within: None,
            ranks: ranks.into(),
            offer: None,
            answer: 1,
        };
        // Number 1 is made by the first that comes for it.
        let seats = [
            arrive(1, Lane::All, 0),
            arrive(1, Lane::All, 2),
            arrive(1, Lane::Pair(0, 1), 0),
            arrive(1, Lane::Pair(0, 1), 2),
            arrive(1, Lane::Pair(0, 7), 1),
            arrive(1, Lane::Pair(1, 7), 0),
            arrive(1, Lane::Founding, 1),
            arrive(0, Lane::All, 1),
        ];
        let groups = [meet(&[]), meet(&[0]), meet(&[1, 2]), meet(&[1, 1])];
        let cases = seats.into_iter().map(|message| (message, "a seat that is not its own"));
        let cases =
            cases.chain(groups.into_iter().map(|message| (message, "ranks that form no group with it")));
        for (message, what) in cases.chain([(arrive(9, Lane::All, 0), "a group that nobody made")]) {
            let failure = failure_of(|to| {
                frame::write(to, &meet(&[0, 1]), &mut Vec::new()).unwrap();
                frame::write(to, &message, &mut Vec::new()).unwrap();
            });
            assert_eq!(
                failure,
                format!("rank 1 failed: it does not speak as a rank does: {what}"),
                "{message:?}"
            );
        }
    }

    #[test]
    fn a_rank_that_arrives_twice_fails_the_world() {
        let failure = failure_of(|to| {
            let ranks = [0, 1].into();
            let meet = ToHub::Meet { key: world(), within: None, ranks, offer: None, answer: 1 };
            frame::write(to, &meet, &mut Vec::new()).unwrap();
            for _ in 0..2 {
                let (group, lane, signature) = (1, Lane::All, signature(1));
                let arrive = ToHub::Arrive { group, lane, sequence: 0, index: 1, signature, answer: None };
                frame::write(to, &arrive, &mut Vec::new()).unwrap();
            }
        });
        assert_eq!(failure, "rank 1 failed at all_reduce #0 of attention tp: it arrived twice");
    }

    /// Its process has stopped, or its machine is gone: the connection does not end.
    #[test]
    fn a_rank_that_falls_silent_fails_the_world() {
        let hub = Hub::listen("127.0.0.1:0", 1, Duration::from_millis(50)).unwrap();
        let stream = TcpStream::connect(hub.address()).unwrap();
        let deadline = hub.shared.board.deadline();
        let hello = ToHub::Hello { version: VERSION.into(), rank: 0, size: 1, deadline };
        frame::write(&mut &stream, &hello, &mut Vec::new()).unwrap();
        let mut heard = Vec::new();
        // Until the hub ends the connection.
        (&stream).read_to_end(&mut heard).unwrap();
        assert_eq!(hub.failure().unwrap().to_string(), "rank 0 failed: its process does not answer");
    }
}
