//! What all ranks computed, put together.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use moe_kernels::{DType, Float};
use moe_model::hf::ModulePlace;
use safetensors::{Dtype, View};

use super::rank::{LogitsBlock, Piece, RankTrace};
use super::{Plan, Tokens, TraceError};
use crate::durable::{Context, rename, temporary_name};
use crate::{Error, Result};

/// Logits, losses and gradients of a batch.
#[derive(Debug)]
pub struct Trace<T> {
    /// The tokens that were traced.
    pub tokens: Tokens,
    /// The mean cross-entropy of next tokens, and the coefficient times the auxiliary loss where the model has one.
    pub loss: f64,
    /// The load-balancing loss over all layers and the whole batch, without its coefficient, where the model has one.
    pub aux_loss: Option<f64>,
    logits: Whole<T>,
    scalars: Vec<(&'static str, T)>,
    grads: Vec<Gradient<T>>,
}

#[derive(Debug)]
struct Whole<T> {
    shape: Vec<usize>,
    values: Vec<T>,
}

/// A parameter's gradient in the pieces that ranks have, each with where its logical tensor starts.
#[derive(Debug)]
struct Gradient<T> {
    name: String,
    shape: Vec<usize>,
    pieces: Vec<(usize, Piece<T>)>,
}

impl Plan {
    /// Tokens that are predicted: N.
    pub(super) fn targets(&self) -> usize {
        self.tokens.batch * (self.tokens.length - 1)
    }

    /// `E Σ_e C_e·P_e / (M·T)²` over layers and tokens of all ranks.
    fn aux_loss<T>(&self, ranks: &[RankTrace<T>]) -> f64 {
        let experts = self.passes.model.num_local_experts;
        let products = (0..experts).map(|expert| {
            let choices: i64 = ranks.iter().map(|rank| rank.choices[expert]).sum();
            let share: f64 = ranks.iter().map(|rank| rank.prob_sums[expert]).sum();
            choices as f64 * share
        });
        let rows = self.passes.model.moe_layers().count() * self.tokens.batch * self.tokens.length;
        experts as f64 * products.sum::<f64>() / (rows as f64).powi(2)
    }
}

impl<T: Float> Trace<T> {
    pub(super) fn gather(plan: &Plan, mut ranks: Vec<RankTrace<T>>) -> Result<Self> {
        let cross_entropy = ranks.iter().map(|rank| rank.loss).sum::<f64>() / plan.targets() as f64;
        let aux_loss = plan.aux_coef.map(|_| plan.aux_loss(&ranks));
        let loss = cross_entropy + plan.aux_coef.zip(aux_loss).map_or(0.0, |(coef, loss)| coef * loss);
        let mut scalars = vec![("loss", T::from_f64(loss))];
        scalars.extend(aux_loss.map(|aux_loss| ("aux_loss", T::from_f64(aux_loss))));

        let blocks = ranks.iter_mut().filter_map(|rank| rank.logits.take());
        let logits = gather_logits(plan, blocks);
        let shapes = if plan.grads { ModulePlace::shapes(&plan.passes.model)? } else { BTreeMap::new() };
        let mut grads: BTreeMap<String, Vec<(usize, Piece<T>)>> =
            shapes.keys().map(|name| (name.clone(), Vec::new())).collect();
        for piece in ranks.into_iter().flat_map(|rank| rank.grads) {
            let place = ModulePlace::of(&piece.part, plan.passes.model.num_local_experts);
            grads.entry(place.name).or_default().push((place.offset, piece));
        }
        let grads = grads.into_iter().zip(shapes.into_values()).map(|((name, pieces), shape)| {
            let elements: usize = pieces.iter().map(|(_, piece)| piece.values.len()).sum();
            match elements == shape.iter().product::<usize>() {
                true => Ok(Gradient { name: format!("grad.{name}"), shape, pieces }),
                false => {
                    Err(Error::Protocol { what: "an element of a gradient is on no rank or on several" })
                }
            }
        });
        let tokens = plan.tokens.clone();
        Ok(Trace { tokens, loss, aux_loss, logits, scalars, grads: grads.collect::<Result<_>>()? })
    }

    /// Its tensors by name: `logits` `[batch, seq, vocab]`, `loss` `[1]`, `aux_loss` `[1]`, `grad.NAME`.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, TracedTensor<'_, T>)> {
        let logits =
            ("logits", TracedTensor::Whole { shape: &self.logits.shape, values: &self.logits.values });
        let scalars = self.scalars.iter().map(|(name, value)| {
            (*name, TracedTensor::Whole { shape: &[1], values: std::slice::from_ref(value) })
        });
        let grads = self.grads.iter().map(|grad| {
            (&*grad.name, TracedTensor::Pieces { shape: &grad.shape, pieces: Pieces(&grad.pieces) })
        });
        [logits].into_iter().chain(scalars).chain(grads)
    }

    /// Writes them, and `input_ids`, to a safetensors file, one after the other; the file is complete or absent.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let temporary = temporary_name(path);
        let Tokens { batch, length, ids } = &self.tokens;
        let ids = ("input_ids", Written::Tokens { shape: [*batch, *length], ids });
        let tensors = self.tensors().map(|(name, tensor)| (name, Written::Traced(tensor)));
        let written = safetensors::serialize_to_file(tensors.chain([ids]), None, &temporary)
            .map_err(|source| TraceError::Write { path: path.to_owned(), source }.into())
            .and_then(|()| Ok(rename(&temporary, path).map_err(TraceError::Io)?));
        if written.is_err() && temporary.exists() {
            fs::remove_file(&temporary).context("remove", &temporary).map_err(TraceError::Io)?;
        }
        written
    }
}

/// `[batch, seq, vocab]`, without padding.
fn gather_logits<T: Float>(plan: &Plan, blocks: impl Iterator<Item = LogitsBlock<T>>) -> Whole<T> {
    let shape = vec![plan.tokens.batch, plan.tokens.length, plan.passes.model.vocab_size];
    let mut values = vec![T::ZERO; shape.iter().product()];
    for LogitsBlock { positions, sequences, vocab, values: block } in blocks {
        let rows = positions.iter().flat_map(|&position| sequences.clone().map(move |b| (b, position)));
        // The last block of the vocabulary may be empty.
        for ((b, position), row) in rows.zip(block.chunks_exact(vocab.len().max(1))) {
            if b < plan.tokens.batch && position < plan.tokens.length {
                let start = (b * plan.tokens.length + position) * plan.passes.model.vocab_size;
                values[start + vocab.start..start + vocab.end].copy_from_slice(row);
            }
        }
    }
    Whole { shape, values }
}

/// A tensor of a trace, to be written or looked at; gradients are put together only then.
#[derive(Debug)]
pub enum TracedTensor<'a, T> {
    /// One that is whole.
    Whole {
        /// Its shape.
        shape: &'a [usize],
        /// Its elements, row by row.
        values: &'a [T],
    },
    /// One in pieces.
    Pieces {
        /// Its shape.
        shape: &'a [usize],
        /// Its elements.
        pieces: Pieces<'a, T>,
    },
}

/// The pieces of a gradient.
#[derive(Debug)]
pub struct Pieces<'a, T>(&'a [(usize, Piece<T>)]);

impl<T: Float> TracedTensor<'_, T> {
    /// Its elements, row by row.
    pub fn values(&self) -> Cow<'_, [T]> {
        let (shape, pieces) = match self {
            TracedTensor::Whole { values, .. } => return Cow::Borrowed(values),
            TracedTensor::Pieces { shape, pieces } => (shape, pieces),
        };
        let mut whole = vec![T::ZERO; shape.iter().product()];
        for (offset, Piece { part, range, values }) in pieces.0 {
            // Row by row of the block.
            let width = part.cols.len();
            let mut at = range.start;
            while at < range.end {
                let end = ((at / width + 1) * width).min(range.end);
                let start = offset + part.logical_index(at);
                whole[start..start + end - at].copy_from_slice(&values[at - range.start..end - range.start]);
                at = end;
            }
        }
        Cow::Owned(whole)
    }
}

impl<T: Float> View for TracedTensor<'_, T> {
    fn dtype(&self) -> Dtype {
        match T::DTYPE {
            DType::F64 => Dtype::F64,
            DType::Bf16 => Dtype::BF16,
            _ => Dtype::F32,
        }
    }

    fn shape(&self) -> &[usize] {
        match self {
            TracedTensor::Whole { shape, .. } | TracedTensor::Pieces { shape, .. } => shape,
        }
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(bytemuck::cast_slice(&self.values()).to_vec())
    }

    fn data_len(&self) -> usize {
        self.shape().iter().product::<usize>() * size_of::<T>()
    }
}

/// What is written to a file.
enum Written<'a, T> {
    Traced(TracedTensor<'a, T>),
    Tokens { shape: [usize; 2], ids: &'a [i64] },
}

impl<T: Float> View for Written<'_, T> {
    fn dtype(&self) -> Dtype {
        match self {
            Written::Traced(tensor) => tensor.dtype(),
            Written::Tokens { .. } => Dtype::I64,
        }
    }

    fn shape(&self) -> &[usize] {
        match self {
            Written::Traced(tensor) => tensor.shape(),
            Written::Tokens { shape, .. } => shape,
        }
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self {
            Written::Traced(tensor) => tensor.data(),
            Written::Tokens { ids, .. } => Cow::Borrowed(bytemuck::cast_slice(ids)),
        }
    }

    fn data_len(&self) -> usize {
        match self {
            Written::Traced(tensor) => tensor.data_len(),
            Written::Tokens { ids, .. } => size_of_val(*ids),
        }
    }
}
