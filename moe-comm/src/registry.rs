//! A rank's communicators.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::marker::PhantomData;

use moe_kernels::Device;
use moe_topology::{Attention, Axes, Expert, Folding, GroupKey, View};

use crate::{Comm, Error, RawComm, Result, World};

/// A rank's communicators: one for each group that it asked for, where groups of the same ranks share one.
///
/// They are made collectively and in one sorted order: every rank asks for the same axes. Calls say which group they are
/// of, so that counts and failures are its own, and ranks that mix up two groups of the same ranks are told.
pub struct Comms<D: Device> {
    device: D,
    raws: Vec<Box<dyn RawComm<D>>>,
    by_key: BTreeMap<GroupKey, usize>,
}

/// Which communicators to make; see [`Comms::builder`].
#[derive(Debug, Clone)]
pub struct CommsBuilder<D> {
    keys: BTreeSet<GroupKey>,
    device: PhantomData<fn() -> D>,
}

impl<D: Device> CommsBuilder<D> {
    /// The group over these attention axes.
    #[must_use]
    pub fn attention(self, axes: Axes<Attention>) -> Self {
        self.key(axes.into())
    }

    /// The group over these expert axes.
    #[must_use]
    pub fn expert(self, axes: Axes<Expert>) -> Self {
        self.key(axes.into())
    }

    /// The group of this key (of a placement, say).
    #[must_use]
    pub fn key(mut self, key: GroupKey) -> Self {
        self.keys.insert(key);
        self
    }

    /// Makes the communicators. Collective over the world.
    ///
    /// # Errors
    /// [`Error::WorldSize`] if the folding is not one of this world; what the world returns.
    pub fn build(self, world: &dyn World<D>, device: &D, folding: &Folding) -> Result<Comms<D>> {
        if folding.world_size() != world.size() {
            return Err(Error::WorldSize { folding: folding.world_size(), world: world.size() });
        }
        let (mut raws, mut by_key) = (Vec::new(), BTreeMap::new());
        let mut by_ranks = HashMap::new();
        for key in self.keys {
            // Groups partition the ranks, so that all ranks of a group come to share it at the same key.
            let ranks = ranks(folding, world.rank(), key);
            let index = match by_ranks.get(&ranks) {
                Some(&index) => index,
                None => {
                    raws.push(world.communicator(key, &ranks)?);
                    by_ranks.insert(ranks, raws.len() - 1);
                    raws.len() - 1
                }
            };
            by_key.insert(key, index);
        }
        Ok(Comms { device: device.clone(), raws, by_key })
    }
}

fn ranks(folding: &Folding, rank: usize, key: GroupKey) -> Vec<usize> {
    fn of<V: View>(folding: &Folding, rank: usize, axes: Axes<V>) -> Vec<usize> {
        folding.group(rank, axes).iter().collect()
    }
    match (key.axes::<Attention>(), key.axes::<Expert>()) {
        (Some(axes), _) => of(folding, rank, axes),
        (_, Some(axes)) => of(folding, rank, axes),
        (None, None) => unreachable!("a key is of one of the two views"),
    }
}

impl<D: Device> fmt::Debug for Comms<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Comms").field("groups", &self.by_key.keys()).finish_non_exhaustive()
    }
}

impl<D: Device> Comms<D> {
    /// Says which communicators to make:
    /// `Comms::builder().attention(Attention::TP).expert(Expert::EP).build(&world, &device, &folding)`.
    pub fn builder() -> CommsBuilder<D> {
        CommsBuilder { keys: BTreeSet::new(), device: PhantomData }
    }

    /// The communicator of the group over these axes.
    ///
    /// # Errors
    /// [`Error::NoGroup`] if it was not made.
    pub fn group<V: View>(&self, axes: Axes<V>) -> Result<Comm<'_, V, D>> {
        let key = axes.into();
        Ok(Comm::new(self.raw(key)?, &self.device, key))
    }

    /// The communicator of a group whose key was read from a placement; its view is not known to the compiler.
    ///
    /// # Errors
    /// [`Error::NoGroup`] if it was not made.
    pub fn keyed(&self, key: GroupKey) -> Result<Comm<'_, GroupKey, D>> {
        Ok(Comm::new(self.raw(key)?, &self.device, key))
    }

    /// Ends all operations of the whole world with an error that carries `why`.
    pub fn abort(&self, why: &str) {
        for raw in &self.raws {
            raw.abort(why);
        }
    }

    fn raw(&self, key: GroupKey) -> Result<&dyn RawComm<D>> {
        match self.by_key.get(&key) {
            Some(&index) => Ok(&*self.raws[index]),
            None => Err(Error::NoGroup { group: key, created: self.by_key.keys().copied().collect() }),
        }
    }
}
