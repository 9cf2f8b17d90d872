//! Chunks of tokens and blocks of the vocabulary against the formula over all of both.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use moe_comm::{ThreadRank, ThreadWorld, World};
use moe_kernels::{Cpu, Device, Tensor};
use moe_topology::{Attention, Folding, Mapping};

use super::Head;
use crate::axes::communicators;
use crate::params::{ParamLayoutBuilder, ParamStore};
use crate::{Cx, LossSum, MicroBatch, ModelConfig, Objective, PipelineLayout, Result, RopeTable};

const HIDDEN: usize = 12;
const TOKENS: usize = 300;
const EPS: f64 = 1e-5;

fn model(vocab: usize) -> ModelConfig {
    let text = format!(
        r#"{{"vocab_size": {vocab}, "hidden_size": {HIDDEN}, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": 1, "num_experts_per_tok": 1,
            "rms_norm_eps": {EPS}}}"#
    );
    serde_json::from_str(&text).unwrap()
}

/// Numbers in [−1, 1] without a pattern.
fn number(stream: usize, i: usize) -> f64 {
    ((i * i + 3 * i + 1) as f64 * 12.9898 + stream as f64 * 78.233).sin()
}

fn numbers(stream: usize, n: usize) -> Vec<f64> {
    (0..n).map(|i| number(stream, i)).collect()
}

/// What a head gets.
struct Input {
    vocab: usize,
    tokens: usize,
    x: Vec<f64>,
    norm: Vec<f64>,
    matrix: Vec<f64>,
    labels: Vec<i32>,
    weights: Vec<f64>,
    total: f64,
}

impl Input {
    fn new(vocab: usize, tokens: usize) -> Self {
        let weights: Vec<f64> = (0..tokens).map(|i| (i % 5) as f64 / 2.0).collect();
        Input {
            vocab,
            tokens,
            x: numbers(1, tokens * HIDDEN),
            norm: numbers(2, HIDDEN),
            matrix: numbers(3, vocab * HIDDEN),
            labels: (0..tokens).map(|i| (i * i * 7 % vocab) as i32).collect(),
            total: weights.iter().sum(),
            weights,
        }
    }
}

/// What a head gives: all tokens, the whole vocabulary.
#[derive(Debug, Clone, Default, PartialEq)]
struct Output {
    /// Σ w·ce of a forward pass alone, and of a pass with gradients.
    losses: [f64; 2],
    logits: Vec<f64>,
    dx: Vec<f64>,
    d_norm: Vec<f64>,
    d_matrix: Vec<f64>,
}

/// The formula, token by token over the whole vocabulary.
fn formula(input: &Input) -> Output {
    let &Input { vocab, total, .. } = input;
    let mut out =
        Output { d_norm: vec![0.0; HIDDEN], d_matrix: vec![0.0; vocab * HIDDEN], ..Output::default() };
    let mut loss = 0.0;
    for (i, x) in input.x.chunks_exact(HIDDEN).enumerate() {
        let r = (x.iter().map(|x| x * x).sum::<f64>() / HIDDEN as f64 + EPS).powf(-0.5);
        let row: Vec<f64> = x.iter().zip(&input.norm).map(|(x, w)| x * r * w).collect();
        let of_word = |word: &[f64]| row.iter().zip(word).map(|(a, b)| a * b).sum::<f64>();
        let logits: Vec<f64> = input.matrix.chunks_exact(HIDDEN).map(of_word).collect();
        let lse = logits.iter().map(|x| x.exp()).sum::<f64>().ln();
        let label = input.labels[i] as usize;
        loss += input.weights[i] * (lse - logits[label]);
        let mut d_row = [0.0; HIDDEN];
        for (c, logit) in logits.iter().enumerate() {
            let hit = if c == label { 1.0 } else { 0.0 };
            let d = input.weights[i] / total * ((logit - lse).exp() - hit);
            for k in 0..HIDDEN {
                d_row[k] += d * input.matrix[c * HIDDEN + k];
                out.d_matrix[c * HIDDEN + k] += d * row[k];
            }
        }
        let along: f64 = (0..HIDDEN).map(|k| d_row[k] * input.norm[k] * x[k]).sum::<f64>() / HIDDEN as f64;
        for k in 0..HIDDEN {
            out.d_norm[k] += d_row[k] * x[k] * r;
            out.dx.push(r * input.norm[k] * d_row[k] - r.powi(3) * along * x[k]);
        }
        out.logits.extend(logits);
    }
    out.losses = [loss; 2];
    out
}

/// A rank's head and context, whose chunks take `chunk_bytes`.
fn rank(input: &Input, tp: usize, chunk_bytes: usize, world: &ThreadRank) -> Result<(Head, Cx<f64, Cpu>)> {
    let (device, config) = (Cpu::poisoned(1), model(input.vocab));
    let folding = Folding::new(Mapping { world_size: tp, tp, ..Mapping::default() })?;
    let rank = World::<Cpu>::rank(world);
    let mut layout = ParamLayoutBuilder::new(&folding, rank);
    let head = Head { chunk_bytes, ..Head::new(&mut layout, &config, &PipelineLayout::even(1, 1, 1)?)? };
    let mut params = ParamStore::<f64, Cpu>::zeros(layout.build(), &device)?;
    for bucket in 0..params.buckets().len() {
        for part in params.buckets()[bucket].parts.clone() {
            let whole = if part.vector { &input.norm } else { &input.matrix };
            let block: Vec<f64> = (0..part.len()).map(|n| whole[part.logical_index(n)]).collect();
            params.weights_mut(bucket)?.upload(&device, part.offset, &block)?;
        }
    }
    let comms = communicators::<Cpu>().build(world, &device, &folding)?;
    let rope = RopeTable::of(&device, &config, 1)?;
    let objective = Objective { micro_batches: 1, sequences: 1, tokens: input.tokens };
    let mut cx = Cx::new(device, comms, params, rope, objective);
    let positions = vec![0; input.tokens];
    let (labels, weights) = (&input.labels, &input.weights);
    cx.batches = vec![MicroBatch::new(&cx.device, 1, labels, &positions, labels, weights, input.total)?];
    Ok((head, cx))
}

/// This rank's rows of the input.
fn own_rows(input: &Input, cx: &Cx<f64, Cpu>) -> Result<(Range<usize>, Tensor<f64, Cpu>)> {
    let tp = cx.group(Attention::TP)?;
    let len = input.tokens / tp.size();
    let rows = tp.rank() * len..(tp.rank() + 1) * len;
    let x = &input.x[rows.start * HIDDEN..rows.end * HIDDEN];
    Ok((rows, Tensor::from_slice(&cx.device, len, HIDDEN, x)?))
}

/// What a rank has of the output, at its places in the whole; 0 elsewhere.
fn outputs(input: &Input, tp: usize, chunk_bytes: usize, world: &ThreadRank) -> Result<Output> {
    let (head, mut cx) = rank(input, tp, chunk_bytes, world)?;
    let device = cx.device.clone();
    let (rows, x) = own_rows(input, &cx)?;
    let mut out = Output {
        logits: vec![0.0; input.tokens * input.vocab],
        dx: vec![0.0; input.x.len()],
        d_norm: vec![0.0; HIDDEN],
        d_matrix: vec![0.0; input.matrix.len()],
        ..Output::default()
    };
    head.loss(0, x.clone(), &mut cx)?;
    out.losses[0] = std::mem::take(&mut cx.stats.loss).total(&device)?;

    cx.logits = Some(BTreeMap::new());
    cx.params.zero_grads(true);
    let dx = head.backward(0, x, &mut cx)?.to_vec(&device)?;
    out.losses[1] = cx.stats.loss.total(&device)?;
    out.dx[rows.start * HIDDEN..rows.end * HIDDEN].copy_from_slice(&dx);
    for bucket in 0..cx.params.buckets().len() {
        let slice = cx.params.reduced(bucket)?.to_vec(&device)?;
        let bucket = &cx.params.buckets()[bucket];
        for part in &bucket.parts {
            let whole = if part.vector { &mut out.d_norm } else { &mut out.d_matrix };
            for at in part.range().filter(|at| bucket.slice.contains(at)) {
                whole[part.logical_index(at - part.offset)] = slice[at - bucket.slice.start];
            }
        }
    }
    if let Some(logits) = cx.logits.take().and_then(|mut all| all.remove(&0)) {
        let block = logits.shape()[1];
        for (at, logit) in logits.to_vec(&device)?.into_iter().enumerate() {
            out.logits[at / block * input.vocab + head.first + at % block] = logit;
        }
    }
    Ok(out)
}

/// All ranks' outputs together.
fn run(vocab: usize, tp: usize, chunk_bytes: usize) -> Output {
    let ranks = ThreadWorld::run(tp, Duration::from_secs(60), move |world| {
        outputs(&Input::new(vocab, TOKENS), tp, chunk_bytes, &world)
    });
    let ranks = ranks.unwrap_or_else(|error| panic!("{error}"));
    let mut all = ranks[0].clone();
    for rank in &ranks[1..] {
        assert_eq!(rank.losses, all.losses, "all ranks have the same loss");
        for (sums, own) in [
            (&mut all.logits, &rank.logits),
            (&mut all.dx, &rank.dx),
            (&mut all.d_norm, &rank.d_norm),
            (&mut all.d_matrix, &rank.d_matrix),
        ] {
            sums.iter_mut().zip(own).for_each(|(sum, x)| *sum += x);
        }
    }
    all
}

fn assert_close(what: &str, got: &[f64], want: &[f64]) {
    let largest = want.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    let worst = got.iter().zip(want).fold(0.0f64, |m, (a, b)| m.max((a - b).abs()));
    assert!(got.len() == want.len() && worst <= 1e-12 * largest, "{what}: {worst:e} of {largest:e}");
}

/// 300 tokens in one chunk, in two, in three of which the last is shorter; blocks of which the last is shorter or empty.
#[test]
fn any_chunks_and_blocks_give_the_formula() {
    for vocab in [5, 37] {
        let want = formula(&Input::new(vocab, TOKENS));
        for tp in [1, 2, 4] {
            for (chunk_bytes, chunks) in [(super::CHUNK_BYTES, 1), (8 * 256 * vocab.div_ceil(tp), 2), (1, 3)]
            {
                let what = format!("{vocab} words over {tp} ranks in {chunks} chunks");
                let got = run(vocab, tp, chunk_bytes);
                assert_close(&format!("losses, {what}"), &got.losses, &want.losses);
                assert_close(&format!("logits, {what}"), &got.logits, &want.logits);
                assert_close(&format!("dx, {what}"), &got.dx, &want.dx);
                assert_close(&format!("norm's gradient, {what}"), &got.d_norm, &want.d_norm);
                assert_close(&format!("matrix's gradient, {what}"), &got.d_matrix, &want.d_matrix);
                assert_eq!(run(vocab, tp, chunk_bytes), got, "the same again, {what}");
            }
        }
    }
}

#[test]
fn chunks_are_nearly_equal_and_fit() {
    let head = |largest_block, chunk_bytes| {
        let config = model(37);
        let folding = Folding::new(Mapping::default()).unwrap();
        let mut layout = ParamLayoutBuilder::new(&folding, 0);
        Head {
            largest_block,
            chunk_bytes,
            ..Head::new(&mut layout, &config, &PipelineLayout::even(1, 1, 1).unwrap()).unwrap()
        }
    };
    for (block, n, len) in [(151_936, 16384, 2048), (32000, 16384, 8192), (32000, 6, 128), (1, 0, 128)] {
        assert_eq!(
            head(block, super::CHUNK_BYTES).chunk_len::<half::bf16>(n),
            len,
            "{n} tokens, {block} words"
        );
    }
    // Never fewer than a tile, however large the vocabulary.
    assert_eq!(head(10_000_000, 1000).chunk_len::<f64>(1000), 128);
}

/// Beside a chunk's logits a pass has a few matrices as large as its input and the gradient of the matrix: neither all logits nor a second chunk.
#[test]
fn one_chunk_of_logits_is_all_there_is() {
    const VOCAB: usize = 4096;
    const N: usize = 1024;
    for backward in [false, true] {
        let peaks = ThreadWorld::run(1, Duration::from_secs(60), move |world| {
            let input = Input::new(VOCAB, N);
            let (head, mut cx) = rank(&input, 1, 1, &world)?;
            let device = cx.device.clone();
            cx.params.zero_grads(false);
            let (_, x) = own_rows(&input, &cx)?;
            cx.stats.loss = LossSum::default();
            let before = device.memory().live;
            device.reset_peak();
            match backward {
                true => drop(head.backward(0, x, &mut cx)?),
                false => head.loss(0, x, &mut cx)?,
            }
            Ok::<_, crate::Error>(device.memory().peak - before)
        });
        let (peak, chunk) = (peaks.unwrap()[0], 128 * VOCAB * 8);
        // The gradient of the matrix has its memory from backward on.
        let besides = 6 * N * HIDDEN * 8 + VOCAB * HIDDEN * 8;
        assert!(peak > chunk && peak < chunk + besides, "{peak} bytes for chunks of {chunk}");
        assert!(besides < chunk / 2);
    }
}
