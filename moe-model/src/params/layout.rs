//! Which block of which logical tensor lies where in a rank's buckets.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use moe_topology::{Attention, Axes, Expert, Folding, GroupKey, Mapping, Placement, View};

use super::init::{Init, Stream, on_all_cores};
use crate::{DecoderStage, Error, Execution, ModelConfig, PipelineLayout, Result};

/// Storage tensors start at multiples of this many elements, which suits vector and bulk copies on every device.
const ALIGN: usize = 64;

/// Starting values that are computed at a time.
const RUN: usize = 1 << 17;

/// A placement in either view.
#[derive(Debug, Clone, PartialEq)]
pub enum Placed {
    /// In the view of attention: everything that is not an expert.
    Attention(Placement<Attention>),
    /// In the view of the experts.
    Expert(Placement<Expert>),
}

impl Placed {
    fn slice(&self, folding: &Folding, rank: usize) -> Vec<Range<usize>> {
        match self {
            Placed::Attention(p) => p.slice(folding, rank).into_iter().collect(),
            Placed::Expert(p) => p.slice(folding, rank).into_iter().collect(),
        }
    }

    fn counts(&self, folding: &Folding, rank: usize) -> bool {
        match self {
            Placed::Attention(p) => p.counts(folding, rank),
            Placed::Expert(p) => p.counts(folding, rank),
        }
    }

    fn dims(&self) -> &[usize] {
        match self {
            Placed::Attention(p) => p.dims(),
            Placed::Expert(p) => p.dims(),
        }
    }

    fn reduction(&self, folding: &Folding, rank: usize) -> Reduction {
        fn of<V: View>(placement: &Placement<V>, folding: &Folding, rank: usize) -> Reduction {
            let instances = placement.instance_axes();
            let several = folding.size(instances) > 1;
            let group = if several { placement.cut_axes() } else { placement.partial() };
            Reduction {
                group: group.into(),
                size: folding.size(group),
                position: folding.coordinate(rank, group),
                instances: several.then(|| instances.into()),
                tied: placement.tied_ranks(folding, rank).is_some(),
            }
        }
        match self {
            Placed::Attention(p) => of(p, folding, rank),
            Placed::Expert(p) => of(p, folding, rank),
        }
    }
}

/// What one layer uses of a rank's parameters: its gradients are complete, and its weights are needed, at one time. So
/// buckets do not reach beyond a segment, and what is cut over ranks does not depend on which layers share a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment(usize);

/// The group over which a gradient is partial: what a bucket is reduced over, and what its optimizer state is cut over,
/// unless several instances of the optimizer each cut it over a part of the group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Reduction {
    group: GroupKey,
    size: usize,
    position: usize,
    instances: Option<GroupKey>,
    tied: bool,
}

/// Name of a logical tensor, as the hub writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Name {
    /// A tensor of its own.
    One(String),
    /// A tensor per expert, `{prefix}{expert}{suffix}`; the placement's leading dimension is the expert.
    PerExpert {
        /// Before the expert's global id.
        prefix: String,
        /// After it.
        suffix: String,
    },
}

/// A mathematical tensor (or one per expert).
#[derive(Debug, Clone, PartialEq)]
pub struct Logical {
    /// Its name.
    pub name: Name,
    /// Its shape (`[n]` or `[rows, cols]`, with a name per expert behind `[experts, …]`) and place.
    pub placement: Placed,
    /// How it starts.
    pub init: Init,
}

/// The block of one logical tensor that this rank holds, and where.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// The logical tensor's name.
    pub name: String,
    /// The logical shape; a vector is `[1, n]`.
    pub dims: [usize; 2],
    /// True for a vector: no weight decay.
    pub vector: bool,
    /// Logical rows of the block.
    pub rows: Range<usize>,
    /// Logical columns of the block.
    pub cols: Range<usize>,
    /// First element of the block in its bucket; the block is stored row by row.
    pub offset: usize,
    /// Whether this rank counts the block in sums over the whole model (false on all but one of its holders that are
    /// not told apart by sharding or reduction).
    pub counts: bool,
    /// How it starts.
    pub init: Init,
}

impl Part {
    /// Elements of the block.
    pub fn len(&self) -> usize {
        self.rows.len() * self.cols.len()
    }

    /// True if the block has no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The block's elements in the bucket.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len()
    }

    /// The starting values of some elements of the block.
    fn initial(&self, stream: Stream, elements: Range<usize>) -> Vec<f64> {
        let mut values = vec![0.0; elements.len()];
        let mut at = elements.start;
        while at < elements.end {
            let end = elements.end.min((at / self.cols.len() + 1) * self.cols.len());
            let run = at - elements.start..end - elements.start;
            stream.fill(self.logical_index(at) as u64, &mut values[run]);
            at = end;
        }
        values
    }

    /// Row-major index in the logical tensor of the block's element `n`.
    pub fn logical_index(&self, n: usize) -> usize {
        let width = self.cols.len();
        (self.rows.start + n / width) * self.dims[1] + self.cols.start + n % width
    }
}

/// Names a storage tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParamId(usize);

impl ParamId {
    pub(super) fn index(self) -> usize {
        self.0
    }
}

/// Names a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BufferId(pub(super) usize);

/// A vector in the accumulation type that is no parameter, whole on all ranks of its stage. It starts at 0.
#[derive(Debug, Clone)]
pub struct BufferLayout {
    /// Name, as in a checkpoint.
    pub name: String,
    /// Elements.
    pub len: usize,
    /// Whether this rank, of all that hold it, writes it.
    pub counts: bool,
}

#[derive(Debug, Clone)]
pub(super) struct Slot {
    pub bucket: usize,
    pub offset: usize,
    pub rows: usize,
    pub cols: usize,
}

impl Slot {
    /// Its elements in the bucket.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.rows * self.cols
    }
}

/// Where the other copy of a tied tensor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OtherCopy {
    /// On the last pipeline rank, or on the first.
    OtherEnd,
    /// In another bucket of this rank, which has the first and the last stage.
    Bucket(usize),
}

/// The tensors of one segment that have one reduction group.
#[derive(Debug, Clone)]
pub struct BucketLayout {
    /// What its gradients are reduced over, and what its optimizer state is cut over.
    pub group: GroupKey,
    /// With several instances of the distributed optimizer: the ranks that keep the same slice, one of each instance, over
    /// which the sums of `group` are partial.
    pub instances: Option<GroupKey>,
    /// Where the other copy is, if the first and the last stage hold one each of what is in it: after the reduction over `group`
    /// their gradients are to be added. Both have the same slices, as nothing else is in the bucket.
    pub other_copy: Option<OtherCopy>,
    /// Segments that use it: two where embedding and head share their matrix on one rank.
    pub users: usize,
    /// Elements, padded so that every rank of the group has an equal slice.
    pub len: usize,
    /// The slice of this rank (ZeRO-1).
    pub slice: Range<usize>,
    /// The blocks, ascending.
    pub parts: Vec<Part>,
}

impl BucketLayout {
    /// Gives `put` the starting values of the elements in `range`, as `rounded` to the type that is wanted, some at a time in
    /// no order, each run with its first element's place in the bucket. What it leaves out, padding among it, is 0. All cores
    /// compute.
    ///
    /// # Errors
    /// Those of `put`.
    pub fn initial<V: Send, E>(
        &self,
        seed: u64,
        range: Range<usize>,
        rounded: impl Fn(f64) -> V + Copy + Sync,
        put: impl FnMut(usize, &[V]) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let mut runs = Vec::new();
        for part in self.parts.iter().filter(|part| part.init != Init::Zeros) {
            let stream = Stream::new(seed, &part.name, part.init);
            let own = part.range();
            let mut start = own.start.max(range.start);
            while start < own.end.min(range.end) {
                let end = own.end.min(range.end).min(start + RUN);
                let run = move || part.initial(stream, start - part.offset..end - part.offset);
                runs.push((start, move || run().into_iter().map(rounded).collect::<Vec<V>>()));
                start = end;
            }
        }
        on_all_cores(&runs, put)
    }
}

/// Where the parameters of one rank lie.
#[derive(Debug, Clone)]
pub struct ParamLayout {
    pub(super) slots: Vec<Slot>,
    buckets: Vec<BucketLayout>,
    buffers: Vec<BufferLayout>,
    /// The buckets that each segment uses, ascending.
    segments: Vec<Vec<usize>>,
}

impl ParamLayout {
    /// All logical tensors of a model: what one rank alone would hold. Nothing is allocated.
    ///
    /// # Errors
    /// The model's fields do not fit together.
    pub fn of_model(model: &ModelConfig) -> Result<Self> {
        let one = Folding::new(Mapping::default())?;
        let mut layout = ParamLayoutBuilder::new(&one, 0);
        let whole = PipelineLayout::even(model.num_hidden_layers, 1, 1)?;
        DecoderStage::of_rank(&mut layout, model, Execution::default(), &whole)?;
        Ok(layout.build())
    }

    /// The buckets, in the order of the layers that use them first, which is the same on all ranks of a stage.
    pub fn buckets(&self) -> &[BucketLayout] {
        &self.buckets
    }

    /// The buckets that a segment uses, ascending.
    pub fn used_by(&self, segment: Segment) -> &[usize] {
        &self.segments[segment.0]
    }

    /// The buffers, each with what names it.
    pub fn buffers(&self) -> impl Iterator<Item = (BufferId, &BufferLayout)> {
        self.buffers.iter().enumerate().map(|(n, buffer)| (BufferId(n), buffer))
    }

    /// `[rows, cols]` of a storage tensor.
    pub fn shape(&self, id: ParamId) -> [usize; 2] {
        let slot = &self.slots[id.0];
        [slot.rows, slot.cols]
    }

    pub(super) fn slot(&self, id: ParamId) -> &Slot {
        &self.slots[id.0]
    }

    pub(super) fn storage_tensors(&self) -> usize {
        self.slots.len()
    }

    /// The storage tensors of a bucket, in the order in which they lie there.
    pub(super) fn slots_of(&self, bucket: usize) -> impl Iterator<Item = (ParamId, &Slot)> {
        let slots = self.slots.iter().enumerate().map(|(n, slot)| (ParamId(n), slot));
        slots.filter(move |(_, slot)| slot.bucket == bucket)
    }

    /// What of a bucket belongs to no storage tensor.
    pub(super) fn padding(&self, bucket: usize) -> impl Iterator<Item = Range<usize>> {
        let starts = self.slots_of(bucket).map(|(_, slot)| slot.offset).chain([self.buckets[bucket].len]);
        let ends = [0].into_iter().chain(self.slots_of(bucket).map(|(_, slot)| slot.range().end));
        ends.zip(starts).map(|(end, start)| end..start).filter(|range| !range.is_empty())
    }
}

/// Collects storage tensors; [`build`](Self::build) lays them out.
#[derive(Debug)]
pub struct ParamLayoutBuilder<'a> {
    folding: &'a Folding,
    rank: usize,
    storage: Vec<Storage>,
    buffers: Vec<BufferLayout>,
    /// The storage tensors that each segment uses; the last one is being built.
    segments: Vec<Vec<usize>>,
}

/// A storage tensor, with the segment that added it.
#[derive(Debug)]
struct Storage {
    segment: usize,
    reduction: Reduction,
    shape: [usize; 2],
    parts: Vec<Part>,
    /// The storage tensor of this rank that has the same weights.
    copy: Option<usize>,
}

impl<'a> ParamLayoutBuilder<'a> {
    /// For one rank of a folding.
    pub fn new(folding: &'a Folding, rank: usize) -> Self {
        let segments = vec![Vec::new()];
        ParamLayoutBuilder { folding, rank, storage: Vec::new(), buffers: Vec::new(), segments }
    }

    /// The folding.
    pub fn folding(&self) -> &'a Folding {
        self.folding
    }

    /// The rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// What is added from here on belongs to a new segment.
    pub fn begin_segment(&mut self) -> Segment {
        self.segments.push(Vec::new());
        Segment(self.segments.len() - 1)
    }

    /// The storage tensor that holds the logical tensor `name` alone, if it was added.
    pub fn find(&self, name: &str) -> Option<ParamId> {
        let alone = |parts: &[Part]| matches!(parts, [part] if part.name == name);
        self.storage.iter().position(|storage| alone(&storage.parts)).map(ParamId)
    }

    /// The same storage tensor for the present segment, too: embedding and head of one stage share a tied matrix.
    pub fn share(&mut self, id: ParamId) -> ParamId {
        self.use_here(id.0);
        id
    }

    /// A storage tensor of its own for the present segment, with the same weights and a part of the gradient, as embedding and head
    /// of two stages of one rank have it of a tied matrix. Neither tensor may have been copied before.
    pub fn copy(&mut self, id: ParamId) -> ParamId {
        let (copy, segment) = (self.storage.len(), self.segments.len() - 1);
        let original = &mut self.storage[id.0];
        original.copy = Some(copy);
        let parts = original.parts.iter().map(|part| Part { counts: false, ..part.clone() }).collect();
        let (reduction, shape) = (original.reduction, original.shape);
        self.storage.push(Storage { segment, reduction, shape, parts, copy: Some(id.0) });
        self.use_here(copy);
        ParamId(copy)
    }

    fn use_here(&mut self, storage: usize) {
        if let Some(segment) = self.segments.last_mut() {
            segment.push(storage);
        }
    }

    /// A storage tensor: this rank's blocks of `logicals`, one below the other (for tensors per expert: all blocks of
    /// the first expert, then of the second, …). They must agree in columns and reduction.
    ///
    /// # Errors
    /// [`Error::Storage`] if they do not, if there are none, or if a name does not fit its number of dimensions.
    pub fn add(&mut self, logicals: &[Logical]) -> Result<ParamId> {
        let reduction = |logical: &Logical| logical.placement.reduction(self.folding, self.rank);
        let common = match logicals {
            [first, ..] => reduction(first),
            [] => return Err(storage_error("", "a storage tensor needs at least one logical tensor")),
        };
        let mut blocks: Vec<(usize, Part)> = Vec::new();
        for logical in logicals {
            if reduction(logical) != common {
                return Err(storage_error(
                    &label(&logical.name),
                    "reduced over other axes than its neighbours",
                ));
            }
            blocks.extend(self.blocks(logical)?);
        }
        blocks.sort_by_key(|(expert, _)| *expert);
        let cols = blocks.first().map_or(0, |(_, part)| part.cols.len());
        let mut parts = Vec::with_capacity(blocks.len());
        let mut rows = 0;
        for (_, mut part) in blocks {
            if part.cols.len() != cols {
                return Err(storage_error(&part.name, "has another number of columns than its neighbours"));
            }
            part.offset = rows * cols;
            rows += part.rows.len();
            parts.push(part);
        }
        let (id, segment) = (self.storage.len(), self.segments.len() - 1);
        self.storage.push(Storage { segment, reduction: common, shape: [rows, cols], parts, copy: None });
        self.use_here(id);
        Ok(ParamId(id))
    }

    /// A vector without a gradient, in the accumulation type, of which all ranks of its stage hold the whole.
    ///
    /// # Errors
    /// The placement is not that of such a vector.
    pub fn add_buffer(&mut self, name: String, placement: &Placement<Attention>) -> Result<BufferId> {
        let &[len] = placement.dims() else {
            return Err(storage_error(&name, "a buffer is a vector"));
        };
        if !placement.shards().is_empty() || placement.partial() != Axes::NONE {
            return Err(storage_error(&name, "a buffer is whole and has no gradient"));
        }
        let counts = placement.counts(self.folding, self.rank);
        self.buffers.push(BufferLayout { name, len, counts });
        Ok(BufferId(self.buffers.len() - 1))
    }

    /// This rank's blocks of a logical tensor, each with its expert (0 for a tensor of its own).
    fn blocks(&self, logical: &Logical) -> Result<Vec<(usize, Part)>> {
        let Logical { name, placement, init } = logical;
        let slice = placement.slice(self.folding, self.rank);
        let counts = placement.counts(self.folding, self.rank);
        let part = |name: String, dims: [usize; 2], vector, rows: &Range<usize>, cols: &Range<usize>| Part {
            name,
            dims,
            vector,
            rows: rows.clone(),
            cols: cols.clone(),
            offset: 0,
            counts,
            init: *init,
        };
        match (name, placement.dims(), slice.as_slice()) {
            (Name::One(name), &[n], [cols]) => Ok(vec![(0, part(name.clone(), [1, n], true, &(0..1), cols))]),
            (Name::One(name), &[r, c], [rows, cols]) => {
                Ok(vec![(0, part(name.clone(), [r, c], false, rows, cols))])
            }
            (Name::PerExpert { prefix, suffix }, &[_, n], [experts, cols]) => Ok(experts
                .clone()
                .map(|e| (e, part(format!("{prefix}{e}{suffix}"), [1, n], true, &(0..1), cols)))
                .collect()),
            (Name::PerExpert { prefix, suffix }, &[_, r, c], [experts, rows, cols]) => Ok(experts
                .clone()
                .map(|e| (e, part(format!("{prefix}{e}{suffix}"), [r, c], false, rows, cols)))
                .collect()),
            _ => Err(storage_error(&label(name), "the name does not fit the number of dimensions")),
        }
    }

    /// Lays the storage tensors out in buckets.
    pub fn build(self) -> ParamLayout {
        let key = |storage: &Storage| {
            let Reduction { group, tied, .. } = storage.reduction;
            (storage.segment, group, tied || storage.copy.is_some())
        };
        let groups: BTreeMap<_, Reduction> =
            self.storage.iter().map(|storage| (key(storage), storage.reduction)).collect();
        let mut slots = vec![Slot { bucket: 0, offset: 0, rows: 0, cols: 0 }; self.storage.len()];
        let mut buckets = Vec::with_capacity(groups.len());
        for (bucket, (own, Reduction { group, size, position, instances, tied, .. })) in
            groups.into_iter().enumerate()
        {
            let mut end = 0;
            let mut all = Vec::new();
            for (slot, storage) in slots.iter_mut().zip(&self.storage).filter(|(_, s)| key(s) == own) {
                let (offset, [rows, cols]) = (end, storage.shape);
                *slot = Slot { bucket, offset, rows, cols };
                let placed = |part: Part| Part { offset: offset + part.offset, ..part };
                all.extend(storage.parts.iter().cloned().map(placed));
                end = (offset + rows * cols).next_multiple_of(ALIGN);
            }
            let per_rank = end.div_ceil(size);
            let slice = position * per_rank..(position + 1) * per_rank;
            buckets.push(BucketLayout {
                group,
                instances,
                other_copy: tied.then_some(OtherCopy::OtherEnd),
                users: 0,
                len: per_rank * size,
                slice,
                parts: all,
            });
        }
        for (slot, storage) in slots.iter().zip(&self.storage) {
            if let Some(copy) = storage.copy {
                buckets[slot.bucket].other_copy = Some(OtherCopy::Bucket(slots[copy].bucket));
            }
        }
        let mut segments = Vec::with_capacity(self.segments.len());
        for storages in self.segments {
            let used: BTreeSet<usize> = storages.into_iter().map(|storage| slots[storage].bucket).collect();
            for &bucket in &used {
                buckets[bucket].users += 1;
            }
            segments.push(used.into_iter().collect());
        }
        ParamLayout { slots, buckets, buffers: self.buffers, segments }
    }
}

fn storage_error(name: &str, what: &str) -> Error {
    Error::Storage { name: name.to_owned(), what: what.to_owned() }
}

fn label(name: &Name) -> String {
    match name {
        Name::One(name) => name.clone(),
        Name::PerExpert { prefix, suffix } => format!("{prefix}*{suffix}"),
    }
}
