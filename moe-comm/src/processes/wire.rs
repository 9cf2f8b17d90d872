//! What ranks and the hub say to each other.

use std::sync::Arc;
use std::time::Duration;

use moe_topology::GroupKey;

use super::bytes::{Bad, Input, Wire, clip};
use super::frame::OFFER;
use crate::board::Lane;
use crate::{Error, Signature};

/// The first bytes of a connection.
const MAGIC: [u8; 8] = *b"moe-hub\n";
/// Ranks of one world run the same build: messages carry no compatibility.
pub(super) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What the whole world does together, outside of any group's operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// The start.
    Join,
    Barrier,
    Share,
}

impl Step {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Step::Join => "join",
            Step::Barrier => "barrier",
            Step::Share => "share",
        }
    }
}

/// Name of the making of a group, in reports.
pub(super) const MEET: &str = "communicator";

/// What a rank says. An `answer` is the number under which it waits for a [`ToLine::Done`].
#[derive(Debug, Clone, PartialEq)]
pub(super) enum ToHub {
    Hello {
        version: String,
        rank: usize,
        size: usize,
        deadline: Duration,
    },
    Step {
        step: Step,
        offer: Option<Arc<[u8]>>,
        answer: u64,
    },
    Meet {
        key: GroupKey,
        /// The group whose ranks meet apart.
        within: Option<u64>,
        ranks: Arc<[usize]>,
        offer: Option<Arc<[u8]>>,
        answer: u64,
    },
    Arrive {
        group: u64,
        lane: Lane,
        sequence: u64,
        index: usize,
        signature: Signature,
        answer: Option<u64>,
    },
    Fail {
        why: String,
    },
    Goodbye,
    /// It is alive.
    Ping,
}

/// What the hub says.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum ToLine {
    Welcome,
    Refused {
        what: String,
    },
    /// All have arrived.
    Done {
        answer: u64,
        group: u64,
        bytes: Arc<[u8]>,
    },
    /// The world has failed: [`Error::Poisoned`].
    Failed(Error),
    Ping,
}

/// A message as bytes.
pub(super) trait Message: Sized {
    fn encode(&self, out: &mut Vec<u8>);
    /// Reads a message that is all of `bytes`.
    fn decode(bytes: &[u8]) -> Result<Self, Bad>;
}

fn whole<T>(bytes: &[u8], take: impl FnOnce(&mut Input<'_>) -> Result<T, Bad>) -> Result<T, Bad> {
    let mut input = Input(bytes);
    let value = take(&mut input)?;
    if input.0.is_empty() { Ok(value) } else { Err("it is longer than what it says") }
}

impl Message for ToHub {
    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            ToHub::Hello { version, rank, size, deadline } => {
                out.push(0);
                out.extend(MAGIC);
                version.put(out);
                rank.put(out);
                size.put(out);
                deadline.put(out);
            }
            ToHub::Step { step, offer, answer } => {
                out.push(1);
                step.put(out);
                offer.put(out);
                answer.put(out);
            }
            ToHub::Meet { key, within, ranks, offer, answer } => {
                out.push(2);
                key.put(out);
                within.put(out);
                ranks.put(out);
                offer.put(out);
                answer.put(out);
            }
            ToHub::Arrive { group, lane, sequence, index, signature, answer } => {
                out.push(3);
                group.put(out);
                lane.put(out);
                sequence.put(out);
                index.put(out);
                signature.put(out);
                answer.put(out);
            }
            ToHub::Fail { why } => {
                out.push(4);
                clip(why, OFFER).to_string().put(out);
            }
            ToHub::Goodbye => out.push(5),
            ToHub::Ping => out.push(6),
        }
    }

    fn decode(bytes: &[u8]) -> Result<Self, Bad> {
        whole(bytes, |input| {
            Ok(match u8::take(input)? {
                0 => {
                    if input.bytes(MAGIC.len())? != MAGIC {
                        return Err("it greets as no rank does");
                    }
                    ToHub::Hello {
                        version: Wire::take(input)?,
                        rank: Wire::take(input)?,
                        size: Wire::take(input)?,
                        deadline: Wire::take(input)?,
                    }
                }
                1 => ToHub::Step {
                    step: Wire::take(input)?,
                    offer: Wire::take(input)?,
                    answer: Wire::take(input)?,
                },
                2 => ToHub::Meet {
                    key: Wire::take(input)?,
                    within: Wire::take(input)?,
                    ranks: Wire::take(input)?,
                    offer: Wire::take(input)?,
                    answer: Wire::take(input)?,
                },
                3 => ToHub::Arrive {
                    group: Wire::take(input)?,
                    lane: Wire::take(input)?,
                    sequence: Wire::take(input)?,
                    index: Wire::take(input)?,
                    signature: Wire::take(input)?,
                    answer: Wire::take(input)?,
                },
                4 => ToHub::Fail { why: Wire::take(input)? },
                5 => ToHub::Goodbye,
                6 => ToHub::Ping,
                _ => return Err("an unknown message"),
            })
        })
    }
}

impl Message for ToLine {
    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            ToLine::Welcome => {
                out.push(0);
                out.extend(MAGIC);
            }
            ToLine::Refused { what } => {
                out.push(1);
                what.put(out);
            }
            ToLine::Done { answer, group, bytes } => {
                out.push(2);
                answer.put(out);
                group.put(out);
                bytes.put(out);
            }
            ToLine::Failed(failure) => {
                out.push(3);
                put_failure(failure, out);
            }
            ToLine::Ping => out.push(4),
        }
    }

    fn decode(bytes: &[u8]) -> Result<Self, Bad> {
        whole(bytes, |input| {
            Ok(match u8::take(input)? {
                0 if input.bytes(MAGIC.len())? == MAGIC => ToLine::Welcome,
                0 => return Err("it greets as no hub does"),
                1 => ToLine::Refused { what: Wire::take(input)? },
                2 => ToLine::Done {
                    answer: Wire::take(input)?,
                    group: Wire::take(input)?,
                    bytes: Wire::take(input)?,
                },
                3 => ToLine::Failed(take_failure(input)?),
                4 => ToLine::Ping,
                _ => return Err("an unknown message"),
            })
        })
    }
}

impl Wire for Step {
    fn put(&self, out: &mut Vec<u8>) {
        out.push(match self {
            Step::Join => 0,
            Step::Barrier => 1,
            Step::Share => 2,
        });
    }
    fn take(input: &mut Input<'_>) -> Result<Self, Bad> {
        match u8::take(input)? {
            0 => Ok(Step::Join),
            1 => Ok(Step::Barrier),
            2 => Ok(Step::Share),
            _ => Err("an unknown step"),
        }
    }
}

/// The names that failures give to operations; the position is the byte.
const NAMES: [&str; 11] = [
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "broadcast",
    "barrier",
    "send",
    "recv",
    "join",
    "share",
    MEET,
];

fn put_failure(failure: &Error, out: &mut Vec<u8>) {
    let Error::Poisoned { rank, group, op, sequence, why } = failure else {
        unreachable!("a board fails with `Poisoned` alone")
    };
    rank.put(out);
    group.put(out);
    op.and_then(|op| NAMES.iter().position(|&name| name == op)).map(|at| at as u8).put(out);
    sequence.put(out);
    clip(why, OFFER).to_string().put(out);
}

fn take_failure(input: &mut Input<'_>) -> Result<Error, Bad> {
    let (rank, group) = (Wire::take(input)?, Wire::take(input)?);
    let op: Option<u8> = Wire::take(input)?;
    let op = match op {
        Some(at) => Some(*NAMES.get(usize::from(at)).ok_or("an unknown operation")?),
        None => None,
    };
    Ok(Error::Poisoned { rank, group, op, sequence: Wire::take(input)?, why: String::take(input)?.into() })
}

#[cfg(test)]
mod tests {
    use moe_kernels::DType;
    use moe_topology::{Attention, Axes, Expert, View};
    use proptest::prelude::*;

    use super::*;
    use crate::{Collective, Reduction};

    fn axes<V: View>(bits: u8, digits: [Axes<V>; 8]) -> Axes<V> {
        (0..8).filter(|i| bits >> i & 1 == 1).fold(Axes::NONE, |axes, i| axes | digits[i])
    }

    fn key() -> impl Strategy<Value = GroupKey> {
        (any::<bool>(), any::<u8>()).prop_map(|(attention, bits)| {
            use {Attention as A, Expert as E};
            if attention {
                let digits = [
                    A::PP_OUTER,
                    A::PP_INNER,
                    A::DP_OUTER,
                    A::DP_INNER,
                    A::CP_OUTER,
                    A::CP_INNER,
                    A::TP_OUTER,
                    A::TP_INNER,
                ];
                axes(bits, digits).into()
            } else {
                let digits = [
                    E::PP_OUTER,
                    E::PP_INNER,
                    E::EDP_OUTER,
                    E::EDP_INNER,
                    E::EP_OUTER,
                    E::EP_INNER,
                    E::ETP_OUTER,
                    E::ETP_INNER,
                ];
                axes(bits, digits).into()
            }
        })
    }

    fn counts() -> impl Strategy<Value = Arc<[usize]>> {
        prop::collection::vec(any::<usize>(), 0..20).prop_map(Into::into)
    }

    fn reduction() -> impl Strategy<Value = Reduction> {
        prop_oneof![Just(Reduction::Sum), Just(Reduction::Max)]
    }

    fn collective() -> impl Strategy<Value = Collective> {
        prop_oneof![
            reduction().prop_map(Collective::AllReduce),
            counts().prop_map(|counts| Collective::AllGather { counts }),
            (reduction(), counts())
                .prop_map(|(reduction, counts)| Collective::ReduceScatter { reduction, counts }),
            (counts(), counts()).prop_map(|(send, recv)| Collective::AllToAll { send, recv }),
            any::<(usize, usize)>().prop_map(|(root, count)| Collective::Broadcast { root, count }),
            Just(Collective::Barrier),
            any::<(usize, u64)>().prop_map(|(to, tag)| Collective::Send { to, tag }),
            any::<(usize, u64, usize)>().prop_map(|(from, tag, count)| Collective::Recv { from, tag, count }),
        ]
    }

    fn signature() -> impl Strategy<Value = Signature> {
        let dtype = prop_oneof![
            Just(DType::F64),
            Just(DType::F32),
            Just(DType::Bf16),
            Just(DType::I64),
            Just(DType::I32),
            Just(DType::U16),
            Just(DType::U8),
        ];
        (key(), collective(), dtype, any::<usize>(), any::<usize>())
            .prop_map(|(group, op, dtype, elements, cols)| Signature { group, op, dtype, elements, cols })
    }

    fn lane() -> impl Strategy<Value = Lane> {
        prop_oneof![
            Just(Lane::All),
            any::<(usize, usize)>().prop_map(|(from, to)| Lane::Pair(from, to)),
            Just(Lane::Founding),
        ]
    }

    fn offer() -> impl Strategy<Value = Option<Arc<[u8]>>> {
        prop::option::of(prop::collection::vec(any::<u8>(), 0..50).prop_map(Into::into))
    }

    fn to_hub() -> impl Strategy<Value = ToHub> {
        let step = prop_oneof![Just(Step::Join), Just(Step::Barrier), Just(Step::Share)];
        let deadline =
            (any::<u64>(), 0u32..1_000_000_000).prop_map(|(secs, nanos)| Duration::new(secs, nanos));
        prop_oneof![
            (".*", any::<usize>(), any::<usize>(), deadline).prop_map(|(version, rank, size, deadline)| {
                ToHub::Hello { version, rank, size, deadline }
            }),
            (step, offer(), any::<u64>()).prop_map(|(step, offer, answer)| ToHub::Step {
                step,
                offer,
                answer
            }),
            (key(), any::<Option<u64>>(), counts(), offer(), any::<u64>()).prop_map(
                |(key, within, ranks, offer, answer)| ToHub::Meet { key, within, ranks, offer, answer }
            ),
            (any::<u64>(), lane(), any::<u64>(), any::<usize>(), signature(), any::<Option<u64>>()).prop_map(
                |(group, lane, sequence, index, signature, answer)| {
                    ToHub::Arrive { group, lane, sequence, index, signature, answer }
                }
            ),
            ".*".prop_map(|why| ToHub::Fail { why }),
            Just(ToHub::Goodbye),
            Just(ToHub::Ping),
        ]
    }

    fn to_line() -> impl Strategy<Value = ToLine> {
        let op = prop::option::of((0..NAMES.len()).prop_map(|at| NAMES[at]));
        let failure = (any::<usize>(), prop::option::of(key()), op, any::<Option<u64>>(), ".*").prop_map(
            |(rank, group, op, sequence, why)| Error::Poisoned { rank, group, op, sequence, why: why.into() },
        );
        prop_oneof![
            Just(ToLine::Welcome),
            ".*".prop_map(|what| ToLine::Refused { what }),
            (any::<u64>(), any::<u64>(), prop::collection::vec(any::<u8>(), 0..50))
                .prop_map(|(answer, group, bytes)| ToLine::Done { answer, group, bytes: bytes.into() }),
            failure.prop_map(ToLine::Failed),
            Just(ToLine::Ping),
        ]
    }

    fn encoded(message: &impl Message) -> Vec<u8> {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        bytes
    }

    proptest! {
        #[test]
        fn what_a_rank_says_arrives(message in to_hub()) {
            prop_assert_eq!(ToHub::decode(&encoded(&message)), Ok(message));
        }

        #[test]
        fn what_the_hub_says_arrives(message in to_line()) {
            prop_assert_eq!(ToLine::decode(&encoded(&message)), Ok(message));
        }

        /// Neither a part of a message, nor one with something after it.
        #[test]
        fn only_whole_messages_are_read(message in to_hub(), cut in any::<prop::sample::Index>()) {
            let mut bytes = encoded(&message);
            prop_assert!(ToHub::decode(&bytes[..cut.index(bytes.len())]).is_err());
            bytes.push(0);
            prop_assert!(ToHub::decode(&bytes).is_err());
        }

        /// Whatever is there ends in a message or an error; if in a message, then in that message alone.
        #[test]
        fn any_bytes_are_read_or_refused(mut bytes in prop::collection::vec(any::<u8>(), 0..200), kind in 0u8..8) {
            if let Some(first) = bytes.first_mut() {
                *first = kind;
            }
            if let Ok(message) = ToHub::decode(&bytes) {
                prop_assert_eq!(encoded(&message), bytes.clone());
            }
            if let Ok(message) = ToLine::decode(&bytes) {
                prop_assert_eq!(encoded(&message), bytes);
            }
        }

        /// One wrong byte in a message that is right.
        #[test]
        fn damaged_messages_are_read_or_refused(
            message in to_hub(), at in any::<prop::sample::Index>(), byte in any::<u8>(),
        ) {
            let mut bytes = encoded(&message);
            let at = at.index(bytes.len());
            bytes[at] = byte;
            if let Ok(message) = ToHub::decode(&bytes) {
                prop_assert_eq!(encoded(&message), bytes);
            }
        }
    }

    #[test]
    fn a_list_is_no_longer_than_its_message() {
        let mut bytes = vec![2, 0, 1];
        (1u64 << 60).put(&mut bytes);
        bytes.extend([0; 100]);
        assert_eq!(ToHub::decode(&bytes), Err("a list is longer than its message"));
    }

    #[test]
    fn every_operation_has_a_name_on_the_wire() {
        let counts: Arc<[usize]> = [].into();
        let ops = [
            Collective::AllReduce(Reduction::Sum),
            Collective::AllGather { counts: counts.clone() },
            Collective::ReduceScatter { reduction: Reduction::Sum, counts: counts.clone() },
            Collective::AllToAll { send: counts.clone(), recv: counts },
            Collective::Broadcast { root: 0, count: 0 },
            Collective::Barrier,
            Collective::Send { to: 0, tag: 0 },
            Collective::Recv { from: 0, tag: 0, count: 0 },
        ];
        let names = ops.iter().map(Collective::name);
        let steps = [Step::Join, Step::Barrier, Step::Share].map(Step::name);
        for op in names.chain(steps).chain([MEET]) {
            assert!(NAMES.contains(&op), "{op}");
        }
    }

    #[test]
    fn a_long_reason_is_cut_between_characters() {
        let why = "ü".repeat(OFFER);
        let Ok(ToHub::Fail { why: read }) = ToHub::decode(&encoded(&ToHub::Fail { why })) else { panic!() };
        assert_eq!(read, "ü".repeat(OFFER / 2));
        assert_eq!(clip("aü", 2), "a");
    }
}
