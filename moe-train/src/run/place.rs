//! Which rank this process is, as its environment says.

use super::ProcessError;

/// Variables in which programs that start processes say which each of them is.
struct Variables {
    rank: &'static str,
    world_size: &'static str,
    local_rank: &'static str,
}

/// Those of torchrun, and of this program's own launcher.
const TORCHRUN: Variables = Variables { rank: "RANK", world_size: "WORLD_SIZE", local_rank: "LOCAL_RANK" };

const SLURM: Variables =
    Variables { rank: "SLURM_PROCID", world_size: "SLURM_NTASKS", local_rank: "SLURM_LOCALID" };

/// Where the hub of a launcher listens.
pub(super) const HUB: &str = "MOE_HUB";
/// Whether ranks may share a GPU.
const SHARE_GPUS: &str = "MOE_SHARE_GPUS";
const MASTER_ADDR: &str = "MASTER_ADDR";
const MASTER_PORT: &str = "MASTER_PORT";
/// Set where torchrun has `MASTER_PORT` for itself.
const AGENT_STORE: &str = "TORCHELASTIC_USE_AGENT_STORE";

/// One of several ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub rank: usize,
    /// Among the ranks of this machine.
    pub local_rank: usize,
    pub hub: Hub,
    /// Whether Slurm gave it, which may show each process its own GPU alone.
    slurm: bool,
}

/// Where the processes meet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Hub {
    /// In the process that started them, which says what went wrong where no rank can.
    Launcher(String),
    /// In the first rank, which listens at one address and is reached at another.
    First { listen: String, address: String },
}

impl Place {
    /// What the variables that `get` looks up say; none if they name no rank, or `world_size` is 1.
    ///
    /// # Errors
    /// They contradict each other or `world_size`, or one is missing or malformed.
    pub fn find(
        world_size: usize,
        get: impl Fn(&str) -> Option<String>,
    ) -> Result<Option<Self>, ProcessError> {
        let torchrun = [TORCHRUN.rank, TORCHRUN.world_size, TORCHRUN.local_rank];
        let given = torchrun.into_iter().find(|variable| get(variable).is_some());
        // A batch script and a shell of an allocation are no tasks of a step, though some of these are set there.
        let task = || get(SLURM.rank).is_some() && get(SLURM.world_size).is_some_and(|tasks| tasks != "1");
        let (variables, beside) = match given {
            Some(given) => (TORCHRUN, given),
            None if task() => (SLURM, SLURM.rank),
            None => return Ok(None),
        };
        let number = |variable, role| {
            let value = get(variable).ok_or(ProcessError::Missing { variable, beside, role })?;
            let number = value.parse::<usize>();
            number.map_err(|_| malformed(variable, value, "a whole number of at least 0".to_owned()))
        };
        let processes = number(variables.world_size, "the number of ranks")?;
        if processes != world_size {
            let variable = variables.world_size;
            return Err(ProcessError::WorldSize { variable, processes, world_size });
        }
        let below = |variable, role| {
            let number = number(variable, role)?;
            match number < world_size {
                true => Ok(number),
                false => {
                    let allowed = format!("below {} = {world_size}", variables.world_size);
                    Err(malformed(variable, number.to_string(), allowed))
                }
            }
        };
        let rank = below(variables.rank, "the rank")?;
        let local_rank = below(variables.local_rank, "the rank among those of this machine")?;
        if world_size == 1 {
            return Ok(None);
        }
        let hub = hub(beside, &get)?;
        Ok(Some(Place { rank, local_rank, hub, slurm: variables.rank == SLURM.rank }))
    }

    /// The GPU of this rank among `gpus`, which ranks share if `share` says so.
    ///
    /// # Errors
    /// There are too few.
    pub fn gpu(&self, gpus: usize, share: bool) -> Result<usize, ProcessError> {
        match gpus {
            _ if self.local_rank < gpus => Ok(self.local_rank),
            1 if self.slurm => Ok(0),
            1.. if share => Ok(self.local_rank % gpus),
            _ => Err(ProcessError::Gpus { ranks: self.local_rank + 1, gpus }),
        }
    }
}

/// Whether ranks may share GPUs.
///
/// # Errors
/// The variable has another value than 1.
pub(super) fn shares_gpus(get: impl Fn(&str) -> Option<String>) -> Result<bool, ProcessError> {
    match get(SHARE_GPUS) {
        None => Ok(false),
        Some(value) if value == "1" => Ok(true),
        Some(value) => Err(malformed(SHARE_GPUS, value, "1, or not set".to_owned())),
    }
}

fn hub(beside: &'static str, get: &impl Fn(&str) -> Option<String>) -> Result<Hub, ProcessError> {
    if let Some(address) = get(HUB) {
        return Ok(Hub::Launcher(address));
    }
    let needed = |variable, role| get(variable).ok_or(ProcessError::Missing { variable, beside, role });
    let host = needed(MASTER_ADDR, "the machine of rank 0")?;
    let value = needed(MASTER_PORT, "a free port of the machine of rank 0")?;
    let taken = u16::from(get(AGENT_STORE).is_some_and(|has| has == "True"));
    let port = value.parse::<u16>().ok().filter(|&port| port > 0).and_then(|port| port.checked_add(taken));
    let Some(port) = port else {
        return Err(malformed(MASTER_PORT, value, format!("a port, from 1 to {}", u16::MAX - taken)));
    };
    // Of a host's names, only these are known to be of no network.
    let (listen, host) = match host.as_str() {
        "localhost" | "127.0.0.1" => ("127.0.0.1", "127.0.0.1".to_owned()),
        _ if host.contains(':') => ("[::]", format!("[{host}]")),
        _ => ("0.0.0.0", host),
    };
    Ok(Hub::First { listen: format!("{listen}:{port}"), address: format!("{host}:{port}") })
}

fn malformed(variable: &'static str, value: String, allowed: String) -> ProcessError {
    ProcessError::Malformed { variable, value, allowed }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TORCHRUN: &str = "RANK=5 WORLD_SIZE=8 LOCAL_RANK=1 MASTER_ADDR=node-7 MASTER_PORT=29500";
    const SLURM: &str = "SLURM_PROCID=5 SLURM_NTASKS=8 SLURM_LOCALID=1 MASTER_ADDR=fd00::1 MASTER_PORT=29500";

    /// The last setting of a variable counts; one to nothing takes it away.
    fn lookup(text: &str) -> impl Fn(&str) -> Option<String> {
        move |name| {
            let set = text.split(' ').filter_map(|set| set.split_once('=')).rfind(|(key, _)| *key == name);
            set.map(|(_, value)| value.to_owned()).filter(|value| !value.is_empty())
        }
    }

    fn find(text: &str) -> Option<Place> {
        Place::find(8, lookup(text)).unwrap()
    }

    fn refusal(text: &str) -> String {
        Place::find(8, lookup(text)).unwrap_err().to_string()
    }

    #[test]
    fn torchrun_slurm_and_the_launcher_say_which_rank_a_process_is() {
        let first =
            |listen: &str, address: &str| Hub::First { listen: listen.into(), address: address.into() };
        let place = |hub, slurm| Some(Place { rank: 5, local_rank: 1, hub, slurm });
        assert_eq!(find(TORCHRUN), place(first("0.0.0.0:29500", "node-7:29500"), false));
        assert_eq!(find(SLURM), place(first("[::]:29500", "[fd00::1]:29500"), true));
        // torchrun's own store has the port.
        let agent = format!("{TORCHRUN} MASTER_ADDR=localhost TORCHELASTIC_USE_AGENT_STORE=True");
        assert_eq!(find(&agent), place(first("127.0.0.1:29501", "127.0.0.1:29501"), false));
        // A launcher's word counts in a job of Slurm, too.
        let launched =
            "SLURM_PROCID=0 SLURM_NTASKS=2 RANK=5 WORLD_SIZE=8 LOCAL_RANK=1 MOE_HUB=127.0.0.1:4000";
        assert_eq!(find(launched), place(Hub::Launcher("127.0.0.1:4000".into()), false));
    }

    #[test]
    fn no_rank_is_named_by_a_bare_environment_or_a_batch_script() {
        for text in ["", "MASTER_ADDR=a MASTER_PORT=b", "SLURM_PROCID=0 SLURM_LOCALID=0", "SLURM_NTASKS=8"] {
            assert_eq!(find(text), None, "{text}");
        }
        assert_eq!(find("SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_LOCALID=0"), None);
        // One rank needs no hub.
        assert_eq!(Place::find(1, lookup("RANK=0 WORLD_SIZE=1 LOCAL_RANK=0")).unwrap(), None);
    }

    #[test]
    fn what_is_missing_malformed_or_contradictory_is_named_with_its_value() {
        let error = Place::find(4, lookup(TORCHRUN)).unwrap_err().to_string();
        assert_eq!(
            error,
            "WORLD_SIZE is 8 and parallel.world_size is 4: start one process for each rank, or set the latter to 8"
        );
        let error = Place::find(1, lookup(SLURM)).unwrap_err().to_string();
        assert!(error.starts_with("SLURM_NTASKS is 8 and parallel.world_size is 1: "), "{error}");
        for (set, wanted) in [
            ("LOCAL_RANK=", "RANK is set and LOCAL_RANK is not: the rank among those of this machine"),
            ("RANK=", "WORLD_SIZE is set and RANK is not: the rank"),
            ("MASTER_PORT=", "RANK is set and MASTER_PORT is not: a free port of the machine of rank 0"),
            ("RANK=-1", "RANK is \"-1\", but it must be a whole number of at least 0"),
            ("RANK=8", "RANK is \"8\", but it must be below WORLD_SIZE = 8"),
            ("LOCAL_RANK=9", "LOCAL_RANK is \"9\", but it must be below WORLD_SIZE = 8"),
            ("MASTER_PORT=http", "MASTER_PORT is \"http\", but it must be a port, from 1 to 65535"),
            (
                "MASTER_PORT=65535 TORCHELASTIC_USE_AGENT_STORE=True",
                "MASTER_PORT is \"65535\", but it must be a port, from 1 to 65534",
            ),
        ] {
            assert_eq!(refusal(&format!("{TORCHRUN} {set}")), wanted);
        }
        let wanted = "SLURM_PROCID is set and SLURM_LOCALID is not: the rank among those of this machine";
        assert_eq!(refusal(&format!("{SLURM} SLURM_LOCALID=")), wanted);
    }

    #[test]
    fn a_rank_has_the_gpu_of_its_local_rank_or_shares_one_if_it_may() {
        let (torchrun, slurm) = (find(TORCHRUN).unwrap(), find(SLURM).unwrap());
        let gpu = |place: &Place, gpus, share| place.gpu(gpus, share).ok();
        assert_eq!([gpu(&torchrun, 2, false), gpu(&torchrun, 1, false)], [Some(1), None]);
        assert_eq!([gpu(&torchrun, 1, true), gpu(&torchrun, 0, true)], [Some(0), None]);
        // `srun --gpus-per-task 1` shows a process its own.
        assert_eq!([gpu(&slurm, 1, false), gpu(&slurm, 0, false)], [Some(0), None]);
        let error = torchrun.gpu(1, false).unwrap_err().to_string();
        assert!(error.starts_with("2 ranks of this machine need a GPU each, and 1 is seen: "), "{error}");
        assert!(error.contains("MOE_SHARE_GPUS=1"), "{error}");
        assert!(shares_gpus(lookup("MOE_SHARE_GPUS=1")).unwrap() && !shares_gpus(lookup("")).unwrap());
        let error = shares_gpus(lookup("MOE_SHARE_GPUS=yes")).unwrap_err().to_string();
        assert_eq!(error, "MOE_SHARE_GPUS is \"yes\", but it must be 1, or not set");
    }
}
