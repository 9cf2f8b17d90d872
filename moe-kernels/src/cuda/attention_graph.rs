//! The graph of attention for cuDNN, forward and backward.
//!
//! The library recognises attention by its formula, operation by operation in a certain order; what lies between the operands stays in
//! registers. Matrices are tensors `[batch, heads, len, dim]` by their strides, as they lie in memory.

use super::cudnn_graph::{Elements, Graph, Node, Pointwise, Reduction, Shape};
use crate::Result;

/// Bytes that rows begin at multiples of.
const ALIGNMENT: i64 = 16;

/// Which keys a query sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Mask {
    Full,
    /// Those up to its own.
    Causal,
    /// Those up to its own, some of which come before the first query's; how many is passed by value.
    Shifted,
}

/// Numbers of a graph's operands: matrices first.
#[derive(Debug, Clone, Copy)]
pub(super) enum Id {
    Q,
    K,
    V,
    O,
    Lse,
    DO,
    DQ,
    DK,
    DV,
    /// What the gradient of queries is added up in.
    Sums,
    Scale,
    Hidden,
    One,
    FirstQuery,
}
use Id::*;

/// How many of them are matrices.
pub(super) const MATRICES: usize = DV as usize + 1;

/// What a plan depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Problem {
    pub(super) backward: bool,
    pub(super) batch: i64,
    pub(super) q_len: i64,
    pub(super) kv_len: i64,
    pub(super) heads: i64,
    pub(super) kv_heads: i64,
    pub(super) head_dim: i64,
    pub(super) v_head_dim: i64,
    pub(super) mask: Mask,
    /// From row to row of each matrix, by its number.
    pub(super) strides: [i64; MATRICES],
}

impl Problem {
    /// Whether a version of the library computes it: before 9.16, the backward takes no keys of which 128 are no divisor.
    pub(super) fn is_right(&self, version: usize) -> bool {
        !self.backward || version >= 91_600 || self.kv_len % 128 == 0
    }

    /// Whether the same bits each time are promised.
    pub(super) fn must_repeat(&self) -> bool {
        !self.backward
    }

    pub(super) fn graph(&self) -> Result<Graph> {
        let mut graph = Graph::default();
        if self.backward {
            self.backward(&mut graph)?
        } else {
            self.forward(&mut graph)?
        }
        Ok(graph)
    }

    /// A matrix `[len · batch, heads · dim]`.
    fn heads(&self, id: Id, heads: i64, len: i64, dim: i64) -> Shape {
        let row = self.strides[id as usize];
        Shape { sizes: [self.batch, heads, len, dim], strides: [row, dim, self.batch * row, 1] }
    }

    /// Operands like queries, like outputs, like keys and like values.
    fn queries(&self, graph: &mut Graph, id: Id) -> Result<Node> {
        let shape = self.heads(id, self.heads, self.q_len, self.head_dim);
        graph.operand(id as i64, Elements::Bf16, shape, ALIGNMENT)
    }

    fn outputs(&self, graph: &mut Graph, id: Id) -> Result<Node> {
        let shape = self.heads(id, self.heads, self.q_len, self.v_head_dim);
        graph.operand(id as i64, Elements::Bf16, shape, ALIGNMENT)
    }

    fn keys(&self, id: Id) -> Shape {
        self.heads(id, self.kv_heads, self.kv_len, self.head_dim)
    }

    fn values(&self, id: Id) -> Shape {
        self.heads(id, self.kv_heads, self.kv_len, self.v_head_dim)
    }

    /// What there is for every query and key of every head.
    fn scores(&self) -> Shape {
        Shape::packed([self.batch, self.heads, self.q_len, self.kv_len])
    }

    /// What there is for every query of every head.
    fn rows(&self) -> Shape {
        Shape::packed([self.batch, self.heads, self.q_len, 1])
    }

    /// `q · kᵀ · scale`, and the scale.
    fn scaled(&self, graph: &mut Graph, q: Node, k: Node) -> Result<[Node; 2]> {
        let scale = graph.scalar(Scale as i64, Elements::F32)?;
        let scores = graph.between(Elements::F32, self.scores())?;
        let scores = graph.product(q, k, scores)?;
        Ok([graph.pointwise(Pointwise::CUDNN_POINTWISE_MUL, &[scores, scale], Elements::F32)?, scale])
    }

    /// −∞ in place of the scores of hidden keys.
    fn masked(&self, graph: &mut Graph, scores: Node) -> Result<Node> {
        if self.mask == Mask::Full {
            return Ok(scores);
        }
        let (mut query, key) = (graph.index(scores, 2)?, graph.index(scores, 3)?);
        if self.mask == Mask::Shifted {
            let first = graph.scalar(FirstQuery as i64, Elements::I32)?;
            query = graph.pointwise(Pointwise::CUDNN_POINTWISE_ADD, &[query, first], Elements::I32)?;
        }
        let seen = graph.pointwise(Pointwise::CUDNN_POINTWISE_CMP_GE, &[query, key], Elements::Bool)?;
        let hidden = graph.scalar(Hidden as i64, Elements::F32)?;
        let select = Pointwise::CUDNN_POINTWISE_BINARY_SELECT;
        graph.pointwise(select, &[scores, hidden, seen], Elements::F32)
    }

    /// `o = softmax(q · kᵀ · scale) · v`, and the logarithm of what the softmax divides by.
    fn forward(&self, graph: &mut Graph) -> Result<()> {
        let q = self.queries(graph, Q)?;
        let k = graph.operand(K as i64, Elements::Bf16, self.keys(K).transposed(), ALIGNMENT)?;
        let v = graph.operand(V as i64, Elements::Bf16, self.values(V), ALIGNMENT)?;
        let o = self.outputs(graph, O)?;
        let lse = self.heads(Lse, self.heads, self.q_len, 1);
        let lse = graph.operand(Lse as i64, Elements::F32, lse, size_of::<f32>() as i64)?;

        let [scores, _] = self.scaled(graph, q, k)?;
        let scores = self.masked(graph, scores)?;
        let max = graph.between(Elements::F32, self.rows())?;
        let max = graph.reduce(Reduction::CUDNN_REDUCE_TENSOR_MAX, scores, max)?;
        let less = graph.pointwise(Pointwise::CUDNN_POINTWISE_SUB, &[scores, max], Elements::F32)?;
        let exp = graph.pointwise(Pointwise::CUDNN_POINTWISE_EXP, &[less], Elements::F32)?;
        let sum = graph.between(Elements::F32, self.rows())?;
        let sum = graph.reduce(Reduction::CUDNN_REDUCE_TENSOR_ADD, exp, sum)?;
        let log = graph.pointwise(Pointwise::CUDNN_POINTWISE_LOG, &[sum], Elements::F32)?;
        graph.pointwise_into(Pointwise::CUDNN_POINTWISE_ADD, &[max, log], None, lse)?;
        let p = graph.pointwise(Pointwise::CUDNN_POINTWISE_DIV, &[exp, sum], Elements::Bf16)?;
        graph.product(p, v, o)?;
        Ok(())
    }

    /// With `p = exp(q · kᵀ · scale − lse)` and `ds = p ⊙ (d_o · vᵀ − Σ d_o ⊙ o) · scale`: `dv = pᵀ · d_o`, `dk = dsᵀ · q`, `dq = ds · k`.
    fn backward(&self, graph: &mut Graph) -> Result<()> {
        let q = self.queries(graph, Q)?;
        let k = graph.operand(K as i64, Elements::Bf16, self.keys(K).transposed(), ALIGNMENT)?;
        let v = graph.operand(V as i64, Elements::Bf16, self.values(V).transposed(), ALIGNMENT)?;
        let (o, d_o) = (self.outputs(graph, O)?, self.outputs(graph, DO)?);
        let lse = graph.operand(Lse as i64, Elements::F32, self.rows(), ALIGNMENT)?;
        let dq = self.queries(graph, DQ)?;
        let dk = graph.operand(DK as i64, Elements::Bf16, self.keys(DK), ALIGNMENT)?;
        let dv = graph.operand(DV as i64, Elements::Bf16, self.values(DV), ALIGNMENT)?;

        // Without the product by one the library takes another way, which needs far more memory.
        let (one, rows) = (graph.scalar(One as i64, Elements::F32)?, self.rows());
        let each = Shape::packed([self.batch, self.heads, self.q_len, self.v_head_dim]);
        let each = graph.between(Elements::F32, each)?;
        let each = graph.pointwise_into(Pointwise::CUDNN_POINTWISE_MUL, &[d_o, o], None, each)?;
        let delta = graph.between(Elements::F32, rows)?;
        let delta = graph.reduce(Reduction::CUDNN_REDUCE_TENSOR_ADD, each, delta)?;
        let delta = graph.pointwise(Pointwise::CUDNN_POINTWISE_MUL, &[delta, one], Elements::F32)?;

        let [scores, scale] = self.scaled(graph, q, k)?;
        let less = graph.pointwise(Pointwise::CUDNN_POINTWISE_SUB, &[scores, lse], Elements::F32)?;
        let less = self.masked(graph, less)?;
        let p = graph.pointwise(Pointwise::CUDNN_POINTWISE_EXP, &[less], Elements::F32)?;
        let p_t = graph.transpose(p)?;
        self.product_of_keys(graph, p_t, d_o, dv)?;

        let dp = graph.between(Elements::F32, self.scores())?;
        let dp = graph.product(d_o, v, dp)?;
        let ds = graph.pointwise(Pointwise::CUDNN_POINTWISE_SUB, &[dp, delta], Elements::F32)?;
        let ds = graph.pointwise(Pointwise::CUDNN_POINTWISE_MUL, &[ds, p], Elements::F32)?;
        let ds = graph.pointwise(Pointwise::CUDNN_POINTWISE_MUL, &[ds, scale], Elements::F32)?;
        let ds_t = graph.transpose(ds)?;
        self.product_of_keys(graph, ds_t, q, dk)?;

        let k = graph.transpose(k)?;
        let sums = Shape::packed([self.batch, self.heads, self.q_len, self.head_dim]);
        let sums = graph.operand(Sums as i64, Elements::F32, sums, ALIGNMENT)?;
        let sums = graph.product(ds, k, sums)?;
        graph.pointwise_into(Pointwise::CUDNN_POINTWISE_IDENTITY, &[sums], None, dq)?;
        Ok(())
    }

    /// `y = aᵀ · b`, over the query heads of each head of keys.
    fn product_of_keys(&self, graph: &mut Graph, a_t: Node, b: Node, y: Node) -> Result<()> {
        if self.heads == self.kv_heads {
            graph.product(a_t, b, y)?;
            return Ok(());
        }
        let [_, _, _, dim] = y.shape.sizes;
        let whole = Shape::packed([self.batch, self.heads, self.kv_len, dim]);
        let whole = graph.between(Elements::Bf16, whole)?;
        let whole = graph.product(a_t, b, whole)?;
        graph.reduce(Reduction::CUDNN_REDUCE_TENSOR_ADD, whole, y)?;
        Ok(())
    }
}
