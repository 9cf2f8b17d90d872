//! The crate's error type.

use crate::recompute::RecomputeModule;

/// Result of every fallible call of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong in a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device refused.
    #[error(transparent)]
    Device(#[from] moe_kernels::Error),
    /// A communicator failed.
    #[error(transparent)]
    Comm(#[from] moe_comm::Error),
    /// The dispatcher failed.
    #[error(transparent)]
    Dispatch(#[from] moe_dispatch::Error),
    /// A placement or a mapping is illegal.
    #[error(transparent)]
    Topology(#[from] moe_topology::Error),
    /// The router met a value that it cannot order.
    #[error("layer {layer}: router logits of token {token} are not a number")]
    RouterNotANumber {
        /// Global index of the layer.
        layer: usize,
        /// Row of the token on this rank.
        token: usize,
    },
    /// Logical tensors that were stacked in one storage tensor do not fit together.
    #[error("{name}: {what}")]
    Storage {
        /// The logical tensor.
        name: String,
        /// Why it does not fit.
        what: String,
    },
    /// Layers that cannot fill the stages.
    #[error("{layers} layers are fewer than the {stages} stages")]
    FewLayers {
        /// Layers of the model.
        layers: usize,
        /// Stages of the pipeline.
        stages: usize,
    },
    /// Stages that cannot be dealt to the ranks evenly.
    #[error("{stages} stages cannot be dealt to {ranks} pipeline ranks: give a multiple of {ranks}")]
    StageCount {
        /// Stages of the layout.
        stages: usize,
        /// Pipeline ranks.
        ranks: usize,
    },
    /// A stage that would pass on what it gets.
    #[error(
        "stage {stage} has no layer: only the first stage (with the embedding) and the last (with the head) may have none"
    )]
    EmptyStage {
        /// The stage.
        stage: usize,
    },
    /// A layout in Megatron's notation that cannot be read.
    #[error("column {column}: {what}\n  {text}\n{:>width$}", '^', width = column + 2)]
    LayoutText {
        /// The layout.
        text: String,
        /// The place, from 1.
        column: usize,
        /// What is wrong there.
        what: String,
    },
    /// A layout of another number of layers.
    #[error("the stages have {got} layers, but the model has {layers}")]
    LayerCount {
        /// Layers of all stages.
        got: usize,
        /// Layers of the model.
        layers: usize,
    },
    /// A layout for another number of pipeline ranks.
    #[error("the layout is for {ranks} pipeline ranks, but the folding has {pp}")]
    LayoutRanks {
        /// Ranks of the layout.
        ranks: usize,
        /// Pipeline ranks of the folding.
        pp: usize,
    },
    /// A placement for other stages than those of a layout.
    #[error(
        "a layout of {} stages on {} ranks cannot be placed as {} stages on {} ranks in {} copies",
        expected.1, expected.0, got.1, got.0, got.2
    )]
    Placement {
        /// Ranks, stages and copies of the layout.
        expected: (u32, u32, u32),
        /// Those of the placement.
        got: (u32, u32, u32),
    },
    /// Stages cannot be placed so.
    #[error(transparent)]
    Pipeline(#[from] moe_pipeline::Error),
    /// A stage got what it does not take.
    #[error("stage {stage}: {what}")]
    Stage {
        /// The stage.
        stage: usize,
        /// What is wrong.
        what: &'static str,
    },
    /// A sliding window was asked for where keys go round a ring, in blocks that are no runs of positions.
    #[error(
        "sliding_window = {window} is not supported on a context-parallel ring of {ranks} ranks; exchange heads by \
         all-to-all instead (cp.inner = cp), or leave the window out"
    )]
    WindowOnRing {
        /// Keys that a query sees.
        window: usize,
        /// Ranks of the ring, the outer digit of CP.
        ranks: usize,
    },
    /// Something to recompute that means nothing.
    #[error("recompute \"{module}\": {why}")]
    Recompute {
        /// Its name.
        module: RecomputeModule,
        /// Why, and what to do.
        why: String,
    },
    /// Backward was given what another kind of layer had kept.
    #[error("what a forward pass kept belongs to another kind of layer")]
    OtherLayer,
    /// Gradients were asked for before they were allocated or after they were taken.
    #[error("there are no gradients now: they live from the start of a step to their reduction")]
    NoGradients,
    /// Weights were asked for while they were being gathered.
    #[error("these weights are being gathered: wait for those of the layer's segment before it uses them")]
    NoWeights,
    /// A micro-batch was asked for that the step does not have.
    #[error("micro-batch {index} of a step with {batches}")]
    NoBatch {
        /// The one asked for.
        index: usize,
        /// Micro-batches of this rank.
        batches: usize,
    },
    /// The load-balancing loss of a whole step was asked for its gradient before its choices were counted.
    #[error(
        "layer {layer}: the choices of a step of {batches} micro-batches were not counted before its backward passes"
    )]
    NotCounted {
        /// Global index of the layer.
        layer: usize,
        /// Micro-batches of this rank.
        batches: usize,
    },
    /// The load-balancing loss over all layers takes the whole step together, but a rank has several micro-batches.
    #[error(
        "the load-balancing loss over all layers of a whole step needs one micro-batch per rank, not {batches}"
    )]
    StepOfSeveral {
        /// Micro-batches of this rank.
        batches: usize,
    },
    /// Choices are replayed, but not those of a layer and micro-batch.
    #[error("layer {layer}: there are no choices to replay for micro-batch {micro_batch} of the rank")]
    NotRecorded {
        /// Global index of the layer.
        layer: usize,
        /// The micro-batch.
        micro_batch: u32,
    },
    /// A sequence cannot be cut into zig-zag chunks.
    #[error("a sequence of {seq_len} tokens is not {chunks} (2·cp) equal chunks: {seq_len} % {chunks} = {}", seq_len % chunks)]
    Chunks {
        /// Tokens of the sequence.
        seq_len: usize,
        /// Chunks, two for each context-parallel rank.
        chunks: usize,
    },
    /// Sequences that cannot be cut into units of dropping.
    #[error(
        "sequences of {seq_len} tokens cannot be cut into drop units of tp = {tp} and cp = {cp}: give sizes for which \
         ({seq_len}/cp) % tp = 0"
    )]
    DropUnit {
        /// Tokens of a sequence.
        seq_len: usize,
        /// Parts of a context-parallel part.
        tp: usize,
        /// Context-parallel parts.
        cp: usize,
    },
    /// Documents were laid out for a ring of another size.
    #[error("the documents of a micro-batch are laid out for a ring of {got} ranks, but it has {ranks}")]
    DocumentSteps {
        /// Ranks that the documents were laid out for.
        got: usize,
        /// Ranks of the ring, the outer digit of CP.
        ranks: usize,
    },
    /// A cache of keys and values has no room for more positions.
    #[error(
        "{len} of {capacity} positions of the key-value cache are taken: there is no room for {added} more"
    )]
    CacheFull {
        /// Positions that are there.
        len: usize,
        /// Positions that were to be added.
        added: usize,
        /// Positions that there is room for.
        capacity: usize,
    },
    /// A cache of keys and values where sequences are cut over ranks.
    #[error(
        "a key-value cache holds whole sequences, but they are cut over {ranks} ranks: use tp = 1 and cp = 1"
    )]
    CacheRanks {
        /// Ranks of TP and CP.
        ranks: usize,
    },
    /// The heads of a tensor-parallel rank cannot be cut over the ranks of an all-to-all.
    #[error(
        "{heads} heads with {kv_heads} key-value heads on a tensor-parallel rank cannot be cut over {ulysses} ranks \
         (cp.inner, Ulysses): it must divide the heads, and divide the key-value heads or be a multiple of them"
    )]
    Heads {
        /// Query heads of the rank.
        heads: usize,
        /// Key and value heads of the rank.
        kv_heads: usize,
        /// Ranks of the all-to-all, the inner digit of CP.
        ulysses: usize,
    },
    /// A buffer was given another number of values.
    #[error("a buffer of {expected} values was given {got}")]
    BufferLength {
        /// Values of the buffer.
        expected: usize,
        /// Values given.
        got: usize,
    },
}

impl Error {
    /// An error of layer `layer`'s router; a NaN names the layer and the token.
    pub(crate) fn in_router(layer: usize, error: moe_dispatch::Error) -> Self {
        match error {
            moe_dispatch::Error::Device(moe_kernels::Error::NotANumber { row, .. }) => {
                Error::RouterNotANumber { layer, token: row }
            }
            other => Error::Dispatch(other),
        }
    }
}
