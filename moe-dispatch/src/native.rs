//! The fabric of this workspace: `moe-kernels` tensors and `moe-comm` communicators.

use std::marker::PhantomData;
use std::ops::Range;

use moe_comm::{Comm, Comms};
use moe_kernels::family::{Elementwise, Routing, Rows, SortOutput};
use moe_kernels::{Backend, Device, Element, Float, Tensor};
use moe_topology::Expert;

use crate::fabric::{Arrived, Fabric, Over, Transfer};
use crate::{Error, Grid, Sorted, SortedRows};

/// Tensors of one device and the rank's communicators, borrowed for as long as a call takes.
///
/// Weights and indices come out as `[1, n]` and may go in as any contiguous matrix.
pub struct NativeFabric<'a, T, D: Device> {
    device: &'a D,
    grid: Grid,
    /// Absent in a group of one rank.
    groups: Option<Groups<'a, D>>,
    element: PhantomData<T>,
}

struct Groups<'a, D: Device> {
    ep: Comm<'a, Expert, D>,
    etp: Comm<'a, Expert, D>,
    ep_etp: Comm<'a, Expert, D>,
}

impl<'a, T: Float, D: Backend<T>> NativeFabric<'a, T, D> {
    /// The fabric of a rank at its place in the world. `comms` has groups over `Expert::EP`, `Expert::ETP` and
    /// `Expert::EP | Expert::ETP`, unless the grid is a single rank.
    ///
    /// # Errors
    /// [`moe_comm::Error::NoGroup`] if one of them was not made; [`Error::Grid`] if the grid is not the
    /// communicators'.
    pub fn new(device: &'a D, grid: Grid, comms: &'a Comms<D>) -> Result<Self, Error> {
        if grid.size() == 1 {
            return Ok(NativeFabric { device, grid, groups: None, element: PhantomData });
        }
        let group = |axes, rank, size| -> Result<Comm<'a, Expert, D>, Error> {
            let comm = comms.group(axes)?;
            if (comm.rank(), comm.size()) == (rank, size) {
                return Ok(comm);
            }
            Err(Error::Grid { rank, size, group: comm.key(), comm_rank: comm.rank(), comm_size: comm.size() })
        };
        let groups = Groups {
            ep: group(Expert::EP, grid.ep_rank(), grid.ep_size())?,
            etp: group(Expert::ETP, grid.etp_rank(), grid.etp_size())?,
            ep_etp: group(Expert::EP | Expert::ETP, grid.rank(), grid.size())?,
        };
        Ok(NativeFabric { device, grid, groups: Some(groups), element: PhantomData })
    }

    /// The fabric of one rank that holds all experts whole: it needs no communicators.
    pub fn single(device: &'a D) -> Self {
        NativeFabric { device, grid: Grid::single(), groups: None, element: PhantomData }
    }

    /// The device.
    pub fn device(&self) -> &'a D {
        self.device
    }

    fn groups(&self) -> Result<&Groups<'a, D>, Error> {
        self.groups.as_ref().ok_or(Error::Alone)
    }

    /// `y[i] = x[index[i]]` for rows of any element.
    fn gather<E: Element>(&self, x: &Tensor<E, D>, index: &Tensor<i32, D>) -> Result<Tensor<E, D>, Error>
    where
        D: Rows<E>,
    {
        let index = row(index)?;
        let mut y = Tensor::uninit(self.device, index.shape()[1], x.shape()[1])?;
        self.device.gather_rows(y.view_mut()?, x.view(), index.view())?;
        Ok(y)
    }

    /// Numbers experts from `local.start` on and the others −1, by looking them up in two tables: rows of a negative
    /// index are 0, so the first table keeps 0 for choices that are routed nowhere.
    fn localize(
        &self,
        experts: &Tensor<i32, D>,
        num_experts: usize,
        local: Range<usize>,
    ) -> Result<Tensor<i32, D>, Error> {
        let from_one: Vec<i32> = (1..=num_experts as i32).collect();
        let mut numbers = vec![-1; num_experts + 1];
        for (number, expert) in local.enumerate() {
            numbers[expert + 1] = number as i32;
        }
        let table = |entries: &[i32]| Tensor::from_slice(self.device, entries.len(), 1, entries);
        self.gather(&table(&numbers)?, &self.gather(&table(&from_one)?, experts)?)
    }
}

/// All elements as `[1, n]`, sharing memory.
fn row<E: Element, D: Device>(x: &Tensor<E, D>) -> Result<Tensor<E, D>, Error> {
    Ok(x.reshape(1, x.layout().len())?)
}

/// All elements as `[n, 1]`, sharing memory.
fn column<E: Element, D: Device>(x: &Tensor<E, D>) -> Result<Tensor<E, D>, Error> {
    Ok(x.reshape(x.layout().len(), 1)?)
}

/// Rows under way, and the weights beside them.
pub struct NativePending<T: Float, D: Device> {
    rows: moe_comm::Pending<T, D>,
    weights: Option<moe_comm::Pending<T::Acc, D>>,
}

impl<T: Float, D: Backend<T>> Fabric for NativeFabric<'_, T, D> {
    type Tensor = Tensor<T, D>;
    type Weights = Tensor<T::Acc, D>;
    type Index = Tensor<i32, D>;
    type Pending = NativePending<T, D>;
    type Error = Error;

    fn grid(&self) -> Grid {
        self.grid
    }

    fn index(&self, entries: &[i32]) -> Result<Self::Index, Error> {
        Ok(Tensor::from_slice(self.device, 1, entries.len(), entries)?)
    }

    fn index_len(&self, index: &Self::Index) -> usize {
        index.layout().len()
    }

    fn sort_by_expert(
        &self,
        experts: &Self::Index,
        top_k: usize,
        num_experts: usize,
        local: Range<usize>,
        rows: SortedRows,
    ) -> Result<Sorted<Self::Index>, Error> {
        let choices = experts.layout().len();
        let tokens = choices.checked_div(top_k).unwrap_or(0);
        let sorted_experts = local.len();
        let experts = match local {
            Range { start: 0, end } if end == num_experts => experts.clone(),
            local => self.localize(experts, num_experts, local)?,
        };
        let (per_expert, sorted_rows) = match rows {
            SortedRows::Packed(_) => (None, choices),
            SortedRows::PerExpert(room) => (Some(room), rows.total(sorted_experts)),
        };
        let mut choice = Tensor::uninit(self.device, 1, sorted_rows)?;
        let mut token = Tensor::uninit(self.device, 1, sorted_rows)?;
        let mut position = Tensor::uninit(self.device, tokens, top_k)?;
        let mut offsets = Tensor::uninit(self.device, 1, sorted_experts + 1)?;
        let out = SortOutput {
            order: choice.view_mut()?,
            tokens: token.view_mut()?,
            position: position.view_mut()?,
            offsets: offsets.view_mut()?,
        };
        let experts = experts.reshape(tokens, top_k)?;
        Routing::<T::Acc>::sort_by_expert(self.device, out, experts.view(), per_expert)?;
        let rows = 0..rows.total(sorted_experts);
        Ok(Sorted { choice: choice.columns(rows.clone())?, token: token.columns(rows)?, position, offsets })
    }

    fn gather_rows(&self, x: &Self::Tensor, index: &Self::Index) -> Result<Self::Tensor, Error> {
        self.gather(x, index)
    }

    fn to_sorted(&self, x: &Self::Tensor, sorted: &Sorted<Self::Index>) -> Result<Self::Tensor, Error> {
        let index = row(&sorted.token)?;
        let mut y = Tensor::uninit(self.device, index.shape()[1], x.shape()[1])?;
        Rows::<T>::spread_rows(self.device, y.view_mut()?, x.view(), index.view(), sorted.position.view())?;
        Ok(y)
    }

    fn gather_sum(&self, x: &Self::Tensor, index: &Self::Index, top_k: usize) -> Result<Self::Tensor, Error> {
        let tokens = index.layout().len().checked_div(top_k).unwrap_or(0);
        let mut y = Tensor::uninit(self.device, tokens, x.shape()[1])?;
        let index = index.reshape(tokens, top_k)?;
        Elementwise::<T>::gather_sum(self.device, y.view_mut()?, x.view(), index.view())?;
        Ok(y)
    }

    fn gather_weights(&self, w: &Self::Weights, index: &Self::Index) -> Result<Self::Weights, Error> {
        row(&self.gather(&column(w)?, index)?)
    }

    fn exchange_counts(&self, offsets: &Self::Index, tokens: usize) -> Result<Vec<i32>, Error> {
        let mut counts = offsets.to_vec(self.device)?;
        counts.push(i32::try_from(tokens).map_err(|_| Error::Counts { what: format!("{tokens} tokens") })?);
        Ok(self.groups()?.ep_etp.all_gather_host(&counts)?)
    }

    fn all_gather_index(&self, index: &Self::Index, counts: &[usize]) -> Result<Self::Index, Error> {
        row(&self.groups()?.ep_etp.all_gather_rows_v(&column(index)?, counts)?)
    }

    fn start(
        &self,
        x: &Self::Tensor,
        weights: Option<&Self::Weights>,
        per_row: usize,
        transfer: Transfer<'_>,
    ) -> Result<Self::Pending, Error> {
        let groups = self.groups()?;
        let comm = match transfer {
            Transfer::AllToAll { .. } => groups.ep,
            Transfer::AllGather { over, .. } | Transfer::ReduceScatter { over, .. } => match over {
                Over::Etp => groups.etp,
                Over::EpEtp => groups.ep_etp,
            },
        };
        let weights = weights.map(|weights| weights.reshape(x.shape()[0], per_row)).transpose()?;
        let weights = weights.map(|weights| send(comm, &weights, transfer)).transpose()?;
        Ok(NativePending { rows: send(comm, x, transfer)?, weights })
    }

    fn wait(&self, pending: Self::Pending) -> Result<Arrived<Self>, Error> {
        let weights = pending.weights.map(|weights| row(&weights.wait()?)).transpose()?;
        Ok((pending.rows.wait()?, weights))
    }
}

fn send<E: Element, D: Device>(
    comm: Comm<'_, Expert, D>,
    x: &Tensor<E, D>,
    transfer: Transfer<'_>,
) -> Result<moe_comm::Pending<E, D>, Error> {
    Ok(match transfer {
        Transfer::AllToAll { send, recv } => {
            comm.start_all_to_all_rows_v(&x.rows(0..send.iter().sum())?, send, recv)?
        }
        Transfer::AllGather { rows, .. } => {
            let own = rows.get(comm.rank()).copied().unwrap_or(0);
            comm.start_all_gather_rows_v(&x.rows(0..own)?, rows)?
        }
        Transfer::ReduceScatter { rows, .. } => comm.start_reduce_scatter_rows_v(x, rows)?,
    })
}

#[cfg(feature = "conformance")]
impl<T: Float, D: Backend<T>> crate::conformance::Inspect for NativeFabric<'_, T, D> {
    fn tensor(&self, rows: usize, values: &[f64]) -> Result<Self::Tensor, Error> {
        Ok(Tensor::from_f64(self.device, rows, crate::conformance::HIDDEN, values)?)
    }

    fn weights(&self, values: &[f64]) -> Result<Self::Weights, Error> {
        Ok(Tensor::from_f64(self.device, 1, values.len(), values)?)
    }

    fn read_tensor(&self, x: &Self::Tensor) -> Result<Vec<f64>, Error> {
        Ok(x.to_f64(self.device)?)
    }

    fn read_weights(&self, w: &Self::Weights) -> Result<Vec<f64>, Error> {
        Ok(w.to_f64(self.device)?)
    }

    fn read_index(&self, index: &Self::Index) -> Result<Vec<i32>, Error> {
        Ok(index.to_vec(self.device)?)
    }
}
