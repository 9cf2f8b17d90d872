//! What a rank in a process of its own says to the others.

use std::thread;
use std::time::Duration;

use moe_comm::WorldError;
use moe_comm::processes::{Hub, Process};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::place::{self, Place};
use crate::{Error, Result};

const UNREADABLE: Error = Error::Protocol { what: "a message between ranks cannot be read" };

/// A rank's line to the others.
pub(super) struct Line {
    process: Process,
    place: Place,
    /// That of the first rank, where no launcher has one. Goes after `process`.
    hub: Option<Hub>,
}

impl Line {
    /// Meets the other ranks.
    ///
    /// # Errors
    /// One does not come.
    pub fn join(place: Place, world_size: usize, deadline: Duration) -> Result<Self> {
        let hub = match &place.hub {
            place::Hub::First { listen, .. } if place.rank == 0 => {
                let hub = Hub::listen(listen, world_size, deadline);
                Some(hub.map_err(|error| of_rank(&place, error.into()))?)
            }
            _ => None,
        };
        let (place::Hub::Launcher(address) | place::Hub::First { address, .. }) = &place.hub;
        let process = Process::join(address, place.rank, world_size, deadline);
        let process = process.map_err(|error| said(&place, error.clone(), error.into()))?;
        Ok(Line { process, place, hub })
    }

    pub fn is_first(&self) -> bool {
        self.place.rank == 0
    }

    /// Waits for all ranks, if this one got so far.
    pub fn all<T>(&self, own: Result<T>) -> Result<T> {
        let own = own.map_err(|error| self.failed(error))?;
        self.process.barrier().map_err(|error| self.failed(error.into()))?;
        Ok(own)
    }

    /// What `first` returns on the first rank, and on the others, which wait for it, what they make of the part that they are
    /// told by `other`.
    pub fn begin<S, O>(
        &self,
        first: impl FnOnce() -> Result<(S, O)> + Send,
        other: impl FnOnce(&S) -> Result<O>,
    ) -> Result<(S, O)>
    where
        S: Serialize + DeserializeOwned + Send,
        O: Send,
    {
        let begun = match self.is_first() {
            true => self.tell(first),
            false => self.hear().and_then(|told| {
                let own = other(&told)?;
                Ok((told, own))
            }),
        };
        begun.map_err(|error| self.failed(error))
    }

    /// Shares nothing in good time while `first` takes its own: the others wait for no longer than their deadline.
    fn tell<S: Serialize + Send, O: Send>(
        &self,
        first: impl FnOnce() -> Result<(S, O)> + Send,
    ) -> Result<(S, O)> {
        let (told, own) = thread::scope(|scope| {
            let main = thread::current();
            let preparing = scope.spawn(move || {
                let done = first();
                main.unpark();
                done
            });
            loop {
                thread::park_timeout(self.process.deadline() / 4);
                if preparing.is_finished() {
                    return preparing.join().unwrap_or(Err(Error::Protocol { what: "rank 0 panicked" }));
                }
                self.process.share(Some(&[]))?;
            }
        })?;
        let bytes = serde_json::to_vec(&told).map_err(|_| UNREADABLE)?;
        self.process.share(Some(&bytes))?;
        Ok((told, own))
    }

    fn hear<S: DeserializeOwned>(&self) -> Result<S> {
        loop {
            let bytes = self.process.share(None)?;
            if !bytes.is_empty() {
                return serde_json::from_slice(&bytes).map_err(|_| UNREADABLE);
            }
        }
    }

    /// Tells the others of an error. What is returned is the world's first failure.
    fn failed(&self, error: Error) -> Error {
        said(&self.place, self.process.fail(&error.to_string()), error)
    }

    /// What `body` comes to on this rank, if it is the first, which speaks for all. The rank has left then.
    pub fn run<T>(self, body: impl FnOnce(Process) -> std::result::Result<T, WorldError>) -> Result<Vec<T>> {
        let Line { process, place, hub } = self;
        let done = body(process);
        if let Some(hub) = hub {
            hub.close();
        }
        match done {
            Ok(outcome) if place.rank == 0 => Ok(vec![outcome]),
            Ok(_) => Ok(Vec::new()),
            Err(error) => Err(said(&place, error.failure.clone(), error.into())),
        }
    }
}

/// What the rank of `place` has to say of its world's `failure`, which it met as `error`.
fn said(place: &Place, failure: moe_comm::Error, error: Error) -> Error {
    match failure {
        moe_comm::Error::Poisoned { rank, .. } if rank == place.rank => match error {
            // They name it.
            Error::World(_) | Error::Comm(moe_comm::Error::Poisoned { .. }) => error,
            error => of_rank(place, error),
        },
        failure @ moe_comm::Error::Poisoned { .. } => {
            let told = matches!(place.hub, place::Hub::Launcher(_));
            Error::OfRank { rank: place.rank, told, source: Box::new(failure.into()) }
        }
        _ => of_rank(place, error),
    }
}

/// An error of this rank alone.
pub(super) fn of_rank(place: &Place, error: Error) -> Error {
    Error::OfRank { rank: place.rank, told: false, source: Box::new(error) }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::command::{exit_status, message};

    const DEADLINE: Duration = Duration::from_secs(20);

    /// What each of three ranks comes to that meet at the hub of a launcher, or else of the first.
    fn ranks<T: Send>(
        launcher: bool,
        deadline: Duration,
        body: impl Fn(Line) -> Result<T> + Sync,
    ) -> [Result<T>; 3] {
        let hub = launcher.then(|| Hub::listen("127.0.0.1:0", 3, deadline).unwrap());
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let get = |rank: usize| {
            let hub = hub.as_ref().map(|hub| hub.address().to_string());
            move |name: &str| match name {
                "RANK" | "LOCAL_RANK" => Some(rank.to_string()),
                "WORLD_SIZE" => Some("3".to_owned()),
                "MOE_HUB" => hub.clone(),
                "MASTER_ADDR" => Some("localhost".to_owned()),
                "MASTER_PORT" => Some(port.to_string()),
                _ => None,
            }
        };
        thread::scope(|scope| {
            let started = [0, 1, 2].map(|rank| {
                let (get, body) = (get(rank), &body);
                scope.spawn(move || {
                    let place = Place::find(3, get).unwrap().unwrap();
                    body(Line::join(place, 3, deadline)?)
                })
            });
            started.map(|rank| rank.join().unwrap())
        })
    }

    #[test]
    fn the_first_rank_prepares_and_the_others_open_what_it_made() {
        for launcher in [true, false] {
            let prepared = AtomicUsize::new(0);
            let begun = ranks(launcher, DEADLINE, |line| {
                line.all(Ok(()))?;
                let first = || {
                    prepared.fetch_add(1, Ordering::Relaxed);
                    Ok(("made".to_owned(), 0))
                };
                let begun = line.begin(first, |told| Ok(told.len()))?;
                line.run(|_| Ok(begun))
            });
            assert_eq!(begun.map(Result::unwrap), [vec![("made".to_owned(), 0)], vec![], vec![]]);
            assert_eq!(prepared.into_inner(), 1);
        }
    }

    #[test]
    fn to_prepare_may_take_longer_than_the_deadline() {
        let deadline = Duration::from_secs(4);
        let begun = ranks(true, deadline, |line| {
            let first = || {
                thread::sleep(deadline * 2);
                Ok((7, ()))
            };
            line.begin(first, |_| Ok(()))
        });
        assert_eq!(begun.map(Result::unwrap), [(7, ()); 3]);
    }

    #[test]
    fn a_refusal_of_the_first_rank_is_the_failure_of_all_and_said_once() {
        let exists = || Error::RunExists { path: "runs/old".into() };
        for launcher in [true, false] {
            let refused = |line: Line| line.begin(|| Err::<((), ()), _>(exists()), |()| Ok(()));
            let [first, second, third] = ranks(launcher, DEADLINE, refused).map(Result::unwrap_err);
            assert_eq!(first.to_string(), format!("rank 0: {}", exists()));
            assert_eq!((exit_status(&first), message(&first)), (2, Some(first.to_string())));
            for other in [second, third] {
                assert!(other.to_string().contains("rank 0 failed: runs/old already holds a run"), "{other}");
                assert_eq!((exit_status(&other), message(&other).is_none()), (5, launcher));
            }
        }
    }

    #[test]
    fn another_rank_that_cannot_open_it_says_so() {
        let opened = |line: Line| {
            let rank = line.place.rank;
            let other = |(): &()| match rank {
                2 => Err(Error::Protocol { what: "no such file" }),
                _ => Ok(()),
            };
            line.begin(|| Ok(((), ())), other)?;
            line.all(Ok(()))
        };
        let [first, second, third] = ranks(true, DEADLINE, opened).map(Result::unwrap_err);
        assert_eq!(message(&third).unwrap(), "rank 2: no such file");
        for error in [first, second] {
            assert!(message(&error).is_none() && error.to_string().contains("rank 2 failed"), "{error}");
        }
    }
}
