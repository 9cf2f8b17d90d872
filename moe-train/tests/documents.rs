//! Documents packed into one sequence: they do not see each other, under any folding.

mod common;

use common::{RandomBatches, assert_equal, setup, tiny_model, train_on};
use moe_dispatch::DispatcherKind::{self, AllGather, AllToAll};
use moe_model::ModelConfig;
use moe_topology::{Attention, Mapping};
use moe_train::trainer::{BatchSource, Sequence, Setup};

/// Random tokens, their documents starting where a pattern says; patterns go round the sequences of a step.
struct Packed {
    source: RandomBatches,
    starts: Vec<Vec<usize>>,
}

impl Packed {
    fn new(setup: &Setup, starts: &[&[usize]]) -> Self {
        let source = RandomBatches {
            vocab: setup.model.vocab_size as u32,
            seq_len: setup.sequence_length,
            micro_batch: setup.micro_batch_size,
        };
        Packed { source, starts: starts.iter().map(|starts| starts.to_vec()).collect() }
    }
}

impl BatchSource for Packed {
    fn micro_batch(&self, step: u64, u: usize) -> moe_train::Result<Vec<Sequence>> {
        let sequences = self.source.micro_batch(step, u)?.into_iter().enumerate();
        let pattern = |b: usize| &self.starts[(u * self.source.micro_batch + b) % self.starts.len()];
        Ok(sequences.map(|(b, sequence)| sequence.separated(pattern(b).iter().copied())).collect())
    }
}

/// Cuts the packed sequences of a source into sequences of their own; all documents have the same length.
struct Apart(Packed, usize);

impl BatchSource for Apart {
    fn micro_batch(&self, step: u64, u: usize) -> moe_train::Result<Vec<Sequence>> {
        let Apart(packed, length) = self;
        let per_sequence = packed.source.seq_len / length;
        let whole = packed.micro_batch(step, u / per_sequence)?.remove(0);
        let at = u % per_sequence * length;
        Ok(vec![Sequence::new(
            whole.tokens[at..=at + length].to_vec(),
            whole.weights[at..at + length].to_vec(),
        )])
    }
}

/// Packed documents of 6, of 4 and of a single token are what each is in a sequence of its own. Losses of micro-batches and
/// sequences, whose units would be others, are off.
#[test]
fn packed_documents_are_documents_apart() {
    let model = ModelConfig { router_aux_loss_coef: Some(0.0), ..tiny_model() };
    for (starts, length, model) in [
        (&[6][..], 6, model.clone()),
        (&[4, 8], 4, ModelConfig { sliding_window: Some(3), use_qk_norm: true, ..model.clone() }),
        (&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], 1, model),
    ] {
        let whole = Setup { global_batch_size: 4, ..setup(model, Mapping::default()) };
        let apart = Setup { global_batch_size: 4 * (12 / length), sequence_length: length, ..whole.clone() };
        let of_apart = train_on(apart, 2, Apart(Packed::new(&whole, &[starts]), length));
        let mut of_whole = train_on(whole.clone(), 2, Packed::new(&whole, &[starts]));
        for (packed, apart) in of_whole.reports.iter_mut().zip(&of_apart.reports) {
            packed.aux_loss = apart.aux_loss;
        }
        assert_equal(&of_whole, &of_apart, &whole, &format!("documents of {length}"));
    }
}

/// `(tp, cp, cp_ulysses, dp, pp, etp, ep)`; the world is tp·cp·dp·pp.
type Sizes = (usize, usize, usize, usize, usize, usize, usize);

fn check(
    model: &ModelConfig,
    foldings: &[(Sizes, DispatcherKind)],
    starts: &[&[usize]],
    tweak: impl Fn(&mut Setup),
) {
    let run = |mapping: Mapping, dispatcher| {
        let mut setup = setup(model.clone(), mapping);
        tweak(&mut setup);
        setup.dispatcher = dispatcher;
        (train_on(setup.clone(), 2, Packed::new(&setup, starts)), setup)
    };
    let (one, setup) = run(Mapping::default(), AllToAll);
    for &((tp, cp, ulysses, dp, pp, etp, ep), dispatcher) in foldings {
        let mapping = Mapping { world_size: tp * cp * dp * pp, tp, cp, pp, etp, ep, ..Mapping::default() };
        let what = format!("{mapping}, cp_ulysses {ulysses}, {dispatcher}");
        let (folded, _) = run(mapping.split(Attention::CP_INNER, ulysses), dispatcher);
        assert_equal(&folded, &one, &setup, &what);
    }
}

/// Sequences of 24 in up to 12 chunks: boundaries inside of chunks, between them, around single tokens, one document over
/// all, and single tokens only.
const ODD: [&[usize]; 4] = [
    &[1, 2, 7, 13, 18],
    &[],
    &[5, 6, 23],
    &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23],
];

#[test]
fn ring_ulysses_and_both() {
    let foldings = [
        ((1, 2, 1, 1, 1, 1, 1), AllToAll),
        ((1, 3, 1, 1, 1, 3, 1), AllToAll),
        ((2, 4, 1, 1, 1, 1, 8), AllToAll),
        ((1, 3, 3, 1, 1, 1, 1), AllGather),
        ((1, 6, 2, 1, 1, 3, 2), AllToAll),
        ((3, 4, 2, 1, 1, 3, 4), AllToAll),
        ((1, 4, 2, 2, 2, 2, 4), AllToAll),
    ];
    check(&tiny_model(), &foldings, &ODD, |setup| {
        setup.sequence_length = 24;
        setup.global_batch_size = 8;
    });
}

/// Sequences of a micro-batch have documents of their own; some micro-batches have none.
#[test]
fn several_sequences_in_a_micro_batch() {
    let model = ModelConfig { num_attention_heads: 8, num_key_value_heads: 2, ..tiny_model() };
    let foldings = [
        ((1, 1, 1, 4, 1, 1, 4), AllToAll),
        ((2, 2, 1, 2, 1, 1, 8), AllToAll),
        ((2, 4, 4, 1, 1, 4, 2), AllToAll),
        ((1, 2, 1, 1, 3, 1, 2), AllGather),
    ];
    let starts: [&[usize]; 6] = [&[3, 9, 10], &[8], &[], &[], &[1, 15], &[4, 12]];
    check(&model, &foldings, &starts, |setup| {
        setup.global_batch_size = 8;
        setup.micro_batch_size = 2;
        setup.sequence_length = 16;
    });
}

/// A window inside of documents, some of them shorter than it.
#[test]
fn with_a_sliding_window() {
    let model = ModelConfig { sliding_window: Some(5), attention_bias: true, ..tiny_model() };
    let foldings = [((2, 1, 1, 2, 1, 2, 2), AllToAll), ((2, 3, 3, 1, 1, 3, 2), AllToAll)];
    check(&model, &foldings, &ODD, |setup| {
        setup.sequence_length = 24;
        setup.global_batch_size = 8;
    });
}

/// Latent attention has one rotary key for all heads.
#[test]
fn with_latent_attention() {
    let model = ModelConfig {
        num_key_value_heads: 12,
        head_dim: None,
        q_lora_rank: Some(10),
        kv_lora_rank: Some(14),
        qk_nope_head_dim: Some(3),
        qk_rope_head_dim: Some(4),
        v_head_dim: Some(5),
        ..tiny_model()
    };
    check(&model, &[((2, 2, 1, 1, 2, 1, 4), AllToAll), ((1, 6, 3, 1, 1, 3, 2), AllToAll)], &ODD, |setup| {
        setup.sequence_length = 24;
        setup.global_batch_size = 4;
    });
}
