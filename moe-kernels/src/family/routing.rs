use crate::{Device, Float, Result, View, ViewMut};

/// How logits become scores and weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ScoreFunction {
    /// Top-k of the logits, then softmax over the chosen (Mixtral).
    SoftmaxPost,
    /// Softmax over all experts, then top-k.
    SoftmaxPre {
        /// Divide the chosen by their sum (`norm_topk_prob`): the softmax over the chosen, also where their probabilities
        /// are too small for the router's type.
        normalize: bool,
    },
    /// Sigmoid of each logit `s`, then top-k (DeepSeek-V3, arXiv 2412.19437).
    Sigmoid {
        /// Divide the chosen by their sum + 1e-20 (`norm_topk_prob`).
        normalize: bool,
    },
    /// `s = sqrt(ln(1 + e^logit))`, then top-k.
    SqrtSoftplus {
        /// Divide the chosen by their sum + 1e-20 (`norm_topk_prob`).
        normalize: bool,
    },
}

impl ScoreFunction {
    /// Whether an expert's score is made of its own logit alone, so that a bias may be added to it.
    pub const fn is_separate(self) -> bool {
        matches!(self, ScoreFunction::Sigmoid { .. } | ScoreFunction::SqrtSoftplus { .. })
    }
}

/// Group-limited choice: experts in `count` contiguous groups, of which a token may use `kept`.
///
/// A group's score is the sum of its `score_top_k` best selection scores; the best groups are kept, ties to the smaller
/// id (DeepSeek-V2, arXiv 2405.04434, with 1; DeepSeek-V3 with 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertGroups {
    /// Groups, a divisor of the number of experts (`n_group`).
    pub count: usize,
    /// Groups that a token may use (`topk_group`).
    pub kept: usize,
    /// Experts whose scores make a group's score.
    pub score_top_k: usize,
}

/// From logits to choices and weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scoring {
    /// From logits to scores.
    pub function: ScoreFunction,
    /// Which experts may be chosen together; all without.
    pub groups: Option<ExpertGroups>,
    /// Multiplies the weights, after normalisation (`routed_scaling_factor`).
    pub scale: f64,
}

impl From<ScoreFunction> for Scoring {
    /// Without groups, weights as they are.
    fn from(function: ScoreFunction) -> Self {
        Scoring { function, groups: None, scale: 1.0 }
    }
}

/// What [`Routing::route`] reads, for `n` tokens and `E` experts.
#[derive(Debug)]
pub struct RouteInput<'a, A: Float, D: Device> {
    /// `[n, E]`.
    pub logits: View<'a, A, D>,
    /// `[1, E]`, added to the selection scores ([separate](ScoreFunction::is_separate) scores, or the logits of a softmax)
    /// where they are compared, not where they become weights. A softmax takes none where there are groups.
    pub bias: Option<View<'a, A, D>>,
    /// `[n, K]`: the choice, if it was made already; each token's experts differ.
    pub given: Option<View<'a, i32, D>>,
    /// `[1, n]`: 0 for padding, whatever its logits: its experts are −1, its weights, scores and log-sum-exp 0.
    pub valid: Option<View<'a, i32, D>>,
}

impl<'a, A: Float, D: Device> RouteInput<'a, A, D> {
    /// Experts are chosen by the logits alone.
    pub fn new(logits: View<'a, A, D>) -> Self {
        RouteInput { logits, bias: None, given: None, valid: None }
    }
}

/// What [`Routing::route`] writes, for `n` tokens, `E` experts, `K` choices.
#[derive(Debug)]
pub struct RouteOutput<'a, A: Float, D: Device> {
    /// `[n, K]`.
    pub weights: ViewMut<'a, A, D>,
    /// `[n, K]`: in descending order of selection score, ties to the smaller id; in the order given.
    pub experts: ViewMut<'a, i32, D>,
    /// `[n, K]`: what the choice would be without groups, bias and a given choice, which the auxiliary loss counts.
    pub unbiased: Option<ViewMut<'a, i32, D>>,
    /// `[n, E]`: scores that sum to one: the softmax, or `s / (Σ s + 1e-20)`.
    pub probs: ViewMut<'a, A, D>,
    /// `[1, n]`: the log-sum-exp of the logits.
    pub lse: ViewMut<'a, A, D>,
    /// `[1, n]`: the least by which a choice stands. For the experts chosen, their worst selection score less the best of the
    /// other candidates; for the groups kept the same; and for the plain choice, if `unbiased` is asked for. What cannot be
    /// otherwise (all are chosen, a given choice, padding) stands by infinity.
    pub margins: Option<ViewMut<'a, A, D>>,
}

/// What [`Routing::sort_by_expert`] writes, for `n` tokens, `E` experts, `K` choices.
#[derive(Debug)]
pub struct SortOutput<'a, D: Device> {
    /// `[1, rows]`: the choice that stands in each row, its flat index `i · K + k`, −1 without.
    pub order: ViewMut<'a, i32, D>,
    /// `[1, rows]`: the token `i` of that choice, −1 without.
    pub tokens: ViewMut<'a, i32, D>,
    /// `[n, K]`: the row of each choice, −1 for choices that have none.
    pub position: ViewMut<'a, i32, D>,
    /// `[1, E + 1]`: the first row of each expert and the end of the last one.
    pub offsets: ViewMut<'a, i32, D>,
}

/// How many choices an expert may keep of each unit of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DropLimit {
    /// Experts that can be chosen, E.
    pub num_experts: usize,
    /// Slots of a unit: unit `u` has the tokens in slots `u · unit_slots .. (u + 1) · unit_slots`.
    pub unit_slots: usize,
    /// Choices of a unit that each expert keeps, C.
    pub capacity: usize,
}

/// Router scores, choice, dropping and sorting. `A` is the router's type, an accumulation type.
pub trait Routing<A: Float>: Device {
    /// Chooses `K` experts for each of `n` tokens.
    ///
    /// The selection score is the logit (softmax-post), the probability (softmax-pre), or `s` (the other functions), plus the
    /// bias; weights are made of scores without bias.
    /// [`Error::NotANumber`](crate::Error::NotANumber) names the first token (but padding) whose log-sum-exp is not
    /// finite: a NaN or +∞ among its logits, or nothing but −∞; or, for a softmax over the chosen, nothing but −∞ among theirs.
    fn route(
        &self,
        out: RouteOutput<'_, A, Self>,
        input: RouteInput<'_, A, Self>,
        scoring: &Scoring,
    ) -> Result<()>;

    /// `sums[e] = Σ_i softmax(logits[i] + bias)[e]`, summed in f64 in a fixed order. `logits: [n, E]`, `bias: [1, E]`,
    /// `sums: [1, E]`. Padding, of which `valid: [1, n]` is 0, adds nothing.
    /// [`Error::NotANumber`](crate::Error::NotANumber) names the first token (but padding) without a softmax.
    fn softmax_sums(
        &self,
        sums: ViewMut<'_, f64, Self>,
        logits: View<'_, A, Self>,
        bias: View<'_, A, Self>,
        valid: Option<View<'_, i32, Self>>,
    ) -> Result<()>;

    /// Multiplies `x[i, h]` by `1 + epsilon·(2u − 1)`, with `u` the element `h` of the stream `tokens[i]` of
    /// [`uniform_pair`](crate::random::uniform_pair)s under `key`: forward and backward of an input that is jittered (arXiv
    /// 2101.03961). The factor is rounded to `A`. `x: [n, H]`, `tokens: [1, n]`.
    fn jitter(
        &self,
        x: ViewMut<'_, A, Self>,
        tokens: View<'_, i64, Self>,
        key: u64,
        epsilon: f64,
    ) -> Result<()>;

    /// Overwrites `dlogits: [n, E]` with the gradient through the weights of the choices `experts: [n, K]`
    /// (`dweights: [n, K]`), plus that of the auxiliary loss, whose derivative by `probs[i, e]` is `aux[i mod B, e]`
    /// (`[B, E]`: one row for all tokens, or one for each of `B` sequences in sequence-major order), plus that of the
    /// z-loss, `z · lse[i]²` per token. The choice is a constant. A token whose experts are all negative is padding: its
    /// gradient is 0.
    #[allow(clippy::too_many_arguments)] // the operands of the formula
    fn route_backward(
        &self,
        dlogits: ViewMut<'_, A, Self>,
        dweights: View<'_, A, Self>,
        experts: View<'_, i32, Self>,
        logits: View<'_, A, Self>,
        scoring: &Scoring,
        aux: View<'_, A, Self>,
        z: f64,
    ) -> Result<()>;

    /// Drops what exceeds the capacity of experts: `kept: [n, K]` is `experts: [n, K]` with −1 for the dropped choices.
    /// Negative experts stay −1 and take no place.
    ///
    /// Token `i` stands in slot `slots[i]` (`[1, n]`), no two in the same one; slots say which unit it belongs to, and
    /// their order decides between choices. Of each unit, each expert keeps the `capacity` choices of the largest
    /// `weights: [n, K]`, ties to the smaller slot, or without weights those of the smallest slots. A token chooses an
    /// expert at most once. The result does not depend on the order of the tokens `i`.
    fn drop_excess(
        &self,
        kept: ViewMut<'_, i32, Self>,
        experts: View<'_, i32, Self>,
        weights: Option<View<'_, A, Self>>,
        slots: View<'_, i32, Self>,
        limit: DropLimit,
    ) -> Result<()>;

    /// Stable counting sort of the `n · K` choices `experts: [n, K]` by expert. Negative experts are routed nowhere.
    ///
    /// Rows are `n · K`, side by side, and those from `offsets[E]` on are without a choice; or with `rows_per_expert` as
    /// many for each expert, whose choices come first: no expert may have more.
    fn sort_by_expert(
        &self,
        out: SortOutput<'_, Self>,
        experts: View<'_, i32, Self>,
        rows_per_expert: Option<usize>,
    ) -> Result<()>;
}
