//! Ranks as children of this process.

use std::ffi::OsString;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::ProcessError;

/// How often children are looked at.
const LOOK: Duration = Duration::from_millis(50);

/// A process for each rank. What is dropped while they run ends them.
pub(super) struct Ranks(Vec<Rank>);

struct Rank {
    child: Child,
    /// None while it runs.
    ended: Option<ExitStatus>,
}

impl Ranks {
    /// Starts `program`, for each rank with its variables in the environment.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(
        program: &Path,
        arguments: &[OsString],
        ranks: Vec<Vec<(&'static str, String)>>,
    ) -> Result<Self, ProcessError> {
        let mut started = Ranks(Vec::new());
        for (rank, variables) in ranks.into_iter().enumerate() {
            let mut command = Command::new(program);
            command.args(arguments).envs(variables).stdin(Stdio::null());
            let child = command.spawn().map_err(|source| {
                let program = program.to_owned();
                ProcessError::Start { rank, program, source }
            })?;
            started.0.push(Rank { child, ended: None });
        }
        Ok(started)
    }

    /// Waits until all have ended; `failure` is the rank that their world failed at and why, once it has. Those that run on for
    /// `grace` after the first failure are killed.
    ///
    /// # Errors
    /// The first that failed.
    pub fn wait(
        mut self,
        grace: Duration,
        failure: impl Fn() -> Option<(usize, String)>,
    ) -> Result<(), ProcessError> {
        let (mut first, mut give_up) = (None, None);
        while self.run()? && give_up.is_none_or(|at| Instant::now() < at) {
            first = first.or_else(|| self.failed());
            if give_up.is_none() && (first.is_some() || failure().is_some()) {
                give_up = Some(Instant::now() + grace);
            }
            thread::sleep(LOOK);
        }
        first = first.or_else(|| self.failed());
        let killed = self.kill();
        if !killed.is_empty() {
            eprintln!(
                "warning: ranks {killed:?} did not end within {grace:?} of the failure, and were killed"
            );
        }
        // One that was killed did not do its part.
        let Some(first) = first.or_else(|| killed.first().copied()) else { return Ok(()) };
        let nobody = || (first, format!("rank {first} did not end by itself"));
        let (rank, why) = failure().unwrap_or_else(nobody);
        let ended = self.0.get(rank).and_then(|rank| rank.ended);
        Err(match ended.map(|status| (status, status.code())) {
            Some((_, Some(code))) if code != 0 && !killed.contains(&rank) => {
                ProcessError::Said { rank, status: u8::try_from(code).unwrap_or(FAILED) }
            }
            Some((status, None)) if !killed.contains(&rank) => {
                ProcessError::Ended { why: format!("{why} ({status})"), status: of_signal(status) }
            }
            _ => ProcessError::Ended { why, status: FAILED },
        })
    }

    /// Whether any runs.
    fn run(&mut self) -> Result<bool, ProcessError> {
        for (rank, Rank { child, ended }) in self.0.iter_mut().enumerate() {
            if ended.is_none() {
                *ended = child.try_wait().map_err(|source| ProcessError::Lost { rank, source })?;
            }
        }
        Ok(self.0.iter().any(|rank| rank.ended.is_none()))
    }

    /// One that ended with a failure.
    fn failed(&self) -> Option<usize> {
        self.0.iter().position(|rank| rank.ended.is_some_and(|status| !status.success()))
    }

    /// Ends those that run, and says which.
    fn kill(&mut self) -> Vec<usize> {
        let mut killed = Vec::new();
        for (rank, Rank { child, ended }) in self.0.iter_mut().enumerate() {
            // One that has ended meanwhile needs no end.
            if ended.is_none() && child.kill().is_ok() {
                *ended = child.wait().ok();
                killed.push(rank);
            }
        }
        killed
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The exit status of a run that failed.
const FAILED: u8 = 5;

/// The exit status of a run with a rank that a signal ended.
#[cfg(unix)]
fn of_signal(status: ExitStatus) -> u8 {
    use std::os::unix::process::ExitStatusExt;
    const INTERRUPT: i32 = 2;
    match status.signal() {
        Some(INTERRUPT) => 130,
        _ => FAILED,
    }
}

#[cfg(not(unix))]
fn of_signal(_: ExitStatus) -> u8 {
    FAILED
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(60);

    fn start(script: &str) -> Ranks {
        let ranks = (0..3).map(|rank| vec![("RANK", rank.to_string())]).collect();
        Ranks::start("/bin/sh".as_ref(), &["-c".into(), script.into()], ranks).unwrap()
    }

    fn nothing() -> Option<(usize, String)> {
        None
    }

    #[test]
    fn ranks_know_who_they_are_and_all_succeed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().display();
        start(&format!("echo $RANK > {path}/$RANK")).wait(GRACE, nothing).unwrap();
        for rank in ["0", "1", "2"] {
            assert_eq!(std::fs::read_to_string(folder.path().join(rank)).unwrap().trim(), rank);
        }
    }

    #[test]
    fn one_that_fails_ends_the_others_and_gives_the_status() {
        // Those that hear of it end by themselves, with a status of their own.
        let folder = tempfile::tempdir().unwrap();
        let heard = folder.path().join("heard");
        let heard = heard.display();
        let script = format!(
            "if [ $RANK = 1 ]; then touch {heard}; exit 4; fi; until [ -e {heard} ]; do sleep 0.1; done; exit 5"
        );
        let world =
            || std::fs::exists(folder.path().join("heard")).unwrap().then(|| (1, "the disk".to_owned()));
        let error = start(&script).wait(GRACE, world).unwrap_err();
        assert!(matches!(error, ProcessError::Said { rank: 1, status: 4 }), "{error:?}");
        // Those that do not hear of it are killed.
        let before = Instant::now();
        let script = "if [ $RANK = 2 ]; then exit 3; fi; exec sleep 600";
        let error = start(script).wait(Duration::from_millis(100), nothing).unwrap_err();
        assert!(matches!(error, ProcessError::Said { rank: 2, status: 3 }), "{error:?}");
        assert!(before.elapsed() < Duration::from_secs(300));
    }

    #[test]
    fn what_no_rank_could_say_is_said_for_it() {
        let killed = "if [ $RANK = 2 ]; then kill -9 $$; fi";
        let error = start(killed).wait(GRACE, nothing).unwrap_err();
        assert!(matches!(error, ProcessError::Ended { status: 5, .. }), "{error:?}");
        assert!(error.to_string().starts_with("rank 2 did not end by itself (signal: 9"), "{error}");
        let world = || Some((2, "rank 2 failed: its process ended".to_owned()));
        let error = start(killed).wait(GRACE, world).unwrap_err();
        assert!(error.to_string().starts_with("rank 2 failed: its process ended (signal: 9"), "{error}");
        // Ctrl-C before a rank listens to it.
        let error = start("kill -2 $$").wait(GRACE, nothing).unwrap_err();
        assert!(matches!(error, ProcessError::Ended { status: 130, .. }), "{error:?}");
        // What their world says of them counts for nothing once all have done their part.
        start("exit 0").wait(GRACE, world).unwrap();
        // The one that hangs is known to the world alone.
        let world = || Some((0, "rank 0 failed at all_reduce".to_owned()));
        let error =
            start("[ $RANK != 0 ] || exec sleep 600").wait(Duration::from_millis(100), world).unwrap_err();
        assert_eq!(error.to_string(), "rank 0 failed at all_reduce");
    }

    #[test]
    fn what_cannot_be_started_is_named() {
        let error = Ranks::start("/nowhere/moe-train".as_ref(), &[], vec![vec![]]).err().unwrap().to_string();
        assert!(error.starts_with("cannot start /nowhere/moe-train as rank 0: "), "{error}");
    }
}
