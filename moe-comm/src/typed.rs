//! Operations on tensors.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use moe_kernels::{Device, Element, Tensor};
use moe_topology::GroupKey;

use crate::call::{product, sum};
use crate::pending::Expected;
use crate::{Call, Collective, Error, Pending, RawComm, Reduction, Result};

/// The communicator of one group of view `V`, lent by [`Comms`](crate::Comms).
///
/// Every rank of the group makes the same calls in the same order. Tensors are matrices `[rows, cols]` and must be
/// contiguous. Operations come blocking, and started (`start_…`) then awaited; ranks are positions in the group.
///
/// What is sent is shared, not copied: until `wait` returns, [`Tensor::view_mut`] of it is refused. In a group of one, at
/// the root of a broadcast, and of a message that was sent, the result *is* what was sent: while it lives, neither of
/// the two can be written.
///
/// # Errors
/// All operations: [`Error::Argument`], [`Error::NotContiguous`] and [`Error::Unsupported`] on the rank whose arguments
/// are wrong, before anything starts; [`Error::Device`] if there is no memory; [`Error::Poisoned`], when started or
/// awaited, once the world has failed: of a mismatch, a deadline, or another rank.
pub struct Comm<'c, V, D: Device> {
    raw: &'c dyn RawComm<D>,
    device: &'c D,
    key: GroupKey,
    view: PhantomData<V>,
}

impl<V, D: Device> Clone for Comm<'_, V, D> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<V, D: Device> Copy for Comm<'_, V, D> {}

impl<V, D: Device> fmt::Debug for Comm<'_, V, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (group, rank, ranks) = (self.key, self.rank(), self.ranks());
        write!(f, "Comm({group}, rank {rank} of {ranks:?})")
    }
}

/// A point-to-point operation, for [`Comm::start_messages`].
#[derive(Debug)]
pub enum Message<T, D: Device> {
    /// A message to rank `to`.
    Send {
        /// The receiver.
        to: usize,
        /// What it is; the receiver expects the same.
        tag: u64,
        /// The message.
        tensor: Tensor<T, D>,
    },
    /// A message of shape `[rows, cols]` from rank `from`.
    Recv {
        /// The sender.
        from: usize,
        /// What it is; the sender says the same.
        tag: u64,
        /// Rows.
        rows: usize,
        /// Columns.
        cols: usize,
    },
}

/// Two messages under way, for [`Comm::start_message_pairs`].
pub type PendingPair<A, B, D> = (Pending<A, D>, Pending<B, D>);

impl<'c, V, D: Device> Comm<'c, V, D> {
    pub(crate) fn new(raw: &'c dyn RawComm<D>, device: &'c D, key: GroupKey) -> Self {
        Comm { raw, device, key, view: PhantomData }
    }

    /// This rank's position in the group.
    pub fn rank(&self) -> usize {
        self.raw.rank()
    }

    /// Ranks in the group.
    pub fn size(&self) -> usize {
        self.raw.size()
    }

    /// What the group is.
    pub fn key(&self) -> GroupKey {
        self.key
    }

    /// The world ranks of the group, in group order.
    pub fn ranks(&self) -> &'c [usize] {
        self.raw.ranks()
    }

    /// The backend's communicator.
    pub fn raw(&self) -> &'c dyn RawComm<D> {
        self.raw
    }

    /// The reduction of all ranks' `x`, of the same shape.
    pub fn all_reduce<T: Element>(&self, x: &Tensor<T, D>, reduction: Reduction) -> Result<Tensor<T, D>> {
        self.start_all_reduce(x, reduction)?.wait()
    }

    /// Starts [`all_reduce`](Self::all_reduce).
    pub fn start_all_reduce<T: Element>(
        &self,
        x: &Tensor<T, D>,
        reduction: Reduction,
    ) -> Result<Pending<T, D>> {
        self.start(Collective::AllReduce(reduction), x, x.shape()[0])
    }

    /// All ranks' rows, in rank order: `[n, c]` → `[size·n, c]`.
    pub fn all_gather_rows<T: Element>(&self, x: &Tensor<T, D>) -> Result<Tensor<T, D>> {
        self.start_all_gather_rows(x)?.wait()
    }

    /// Starts [`all_gather_rows`](Self::all_gather_rows).
    pub fn start_all_gather_rows<T: Element>(&self, x: &Tensor<T, D>) -> Result<Pending<T, D>> {
        self.start_all_gather_rows_v(x, &vec![x.shape()[0]; self.size()])
    }

    /// All ranks' rows, of which rank `i` has `rows[i]`: `[rows[rank], c]` → `[Σ rows, c]`.
    pub fn all_gather_rows_v<T: Element>(&self, x: &Tensor<T, D>, rows: &[usize]) -> Result<Tensor<T, D>> {
        self.start_all_gather_rows_v(x, rows)?.wait()
    }

    /// Starts [`all_gather_rows_v`](Self::all_gather_rows_v).
    pub fn start_all_gather_rows_v<T: Element>(
        &self,
        x: &Tensor<T, D>,
        rows: &[usize],
    ) -> Result<Pending<T, D>> {
        let [n, cols] = x.shape();
        let op = Collective::AllGather { counts: elements("all_gather", rows, cols)? };
        match rows.get(self.rank()) {
            Some(&mine) if mine != n => {
                Err(argument(&op, format!("{n} rows where `rows` says {mine} for this rank")))
            }
            _ => {
                let rows = sum(op.name(), rows)?;
                self.start(op, x, rows)
            }
        }
    }

    /// The sum of all ranks' `x`, of which every rank receives its part: `[size·n, c]` → `[n, c]`.
    pub fn reduce_scatter_rows<T: Element>(&self, x: &Tensor<T, D>) -> Result<Tensor<T, D>> {
        self.start_reduce_scatter_rows(x)?.wait()
    }

    /// Starts [`reduce_scatter_rows`](Self::reduce_scatter_rows).
    pub fn start_reduce_scatter_rows<T: Element>(&self, x: &Tensor<T, D>) -> Result<Pending<T, D>> {
        let (n, size) = (x.shape()[0], self.size());
        if n % size != 0 {
            return Err(Error::Argument {
                op: "reduce_scatter",
                what: format!("{n} rows over {size} ranks: give every rank's number of rows"),
            });
        }
        self.start_reduce_scatter_rows_v(x, &vec![n / size; size])
    }

    /// The sum of all ranks' `x`, of which rank `i` receives the `i`-th part, `rows[i]` rows:
    /// `[Σ rows, c]` → `[rows[rank], c]`.
    pub fn reduce_scatter_rows_v<T: Element>(
        &self,
        x: &Tensor<T, D>,
        rows: &[usize],
    ) -> Result<Tensor<T, D>> {
        self.start_reduce_scatter_rows_v(x, rows)?.wait()
    }

    /// Starts [`reduce_scatter_rows_v`](Self::reduce_scatter_rows_v).
    pub fn start_reduce_scatter_rows_v<T: Element>(
        &self,
        x: &Tensor<T, D>,
        rows: &[usize],
    ) -> Result<Pending<T, D>> {
        let [n, cols] = x.shape();
        let counts = elements("reduce_scatter", rows, cols)?;
        let op = Collective::ReduceScatter { reduction: Reduction::Sum, counts };
        self.require_rows(&op, n, rows)?;
        self.start(op, x, rows[self.rank()])
    }

    /// The first `send[0]` rows go to rank 0, the next `send[1]` to rank 1…; `recv[i]` rows come from rank `i`, in
    /// rank order: `[Σ send, c]` → `[Σ recv, c]`.
    pub fn all_to_all_rows_v<T: Element>(
        &self,
        x: &Tensor<T, D>,
        send: &[usize],
        recv: &[usize],
    ) -> Result<Tensor<T, D>> {
        self.start_all_to_all_rows_v(x, send, recv)?.wait()
    }

    /// Starts [`all_to_all_rows_v`](Self::all_to_all_rows_v).
    pub fn start_all_to_all_rows_v<T: Element>(
        &self,
        x: &Tensor<T, D>,
        send: &[usize],
        recv: &[usize],
    ) -> Result<Pending<T, D>> {
        let [n, cols] = x.shape();
        let name = "all_to_all";
        let op =
            Collective::AllToAll { send: elements(name, send, cols)?, recv: elements(name, recv, cols)? };
        self.require_rows(&op, n, send)?;
        self.start(op, x, sum(name, recv)?)
    }

    /// What `root` has, of shape `[rows, cols]`, which all ranks know; `x` is read at the root alone.
    pub fn broadcast<T: Element>(
        &self,
        root: usize,
        x: Option<&Tensor<T, D>>,
        shape: [usize; 2],
    ) -> Result<Tensor<T, D>> {
        self.start_broadcast(root, x, shape)?.wait()
    }

    /// Starts [`broadcast`](Self::broadcast).
    pub fn start_broadcast<T: Element>(
        &self,
        root: usize,
        x: Option<&Tensor<T, D>>,
        [rows, cols]: [usize; 2],
    ) -> Result<Pending<T, D>> {
        let op = Collective::Broadcast { root, count: product("broadcast", rows, cols)? };
        if self.rank() != root {
            let (call, result) = self.receiving(op, rows, cols)?;
            return Ok(Pending { flight: self.raw.start(call)?, result });
        }
        match x {
            Some(x) if x.shape() == [rows, cols] => {
                let call = self.sending(op, x)?;
                Ok(Pending { flight: self.raw.start(call)?, result: Expected::Sent(x.clone()) })
            }
            Some(x) => {
                Err(argument(&op, format!("the root has {:?} where [{rows}, {cols}] is sent", x.shape())))
            }
            None => Err(argument(&op, "the root has nothing to send".into())),
        }
    }

    /// Returns when all ranks have entered.
    pub fn barrier(&self) -> Result<()> {
        let op = Collective::Barrier;
        let call = Call { group: self.key, op, dtype: u8::DTYPE, cols: 0, send: None, recv: None };
        self.raw.start(call)?.wait().map(drop)
    }

    /// Starts sending `x` to rank `to`. Messages of a pair of ranks arrive in order, and tags must agree. The send is
    /// done when the receiver has started to receive; nothing may rely on an earlier end, as a buffer would bring.
    pub fn send<T: Element>(&self, to: usize, tag: u64, x: &Tensor<T, D>) -> Result<Pending<T, D>> {
        let call = self.sending(Collective::Send { to, tag }, x)?;
        Ok(Pending { flight: self.raw.start(call)?, result: Expected::Sent(x.clone()) })
    }

    /// Starts receiving a `[rows, cols]` tensor from rank `from`.
    pub fn recv<T: Element>(&self, from: usize, tag: u64, rows: usize, cols: usize) -> Result<Pending<T, D>> {
        let op = Collective::Recv { from, tag, count: product("recv", rows, cols)? };
        let (call, result) = self.receiving(op, rows, cols)?;
        Ok(Pending { flight: self.raw.start(call)?, result })
    }

    /// Starts several messages at once: whatever their order, they do not wait for each other.
    pub fn start_messages<T: Element>(&self, messages: Vec<Message<T, D>>) -> Result<Vec<Pending<T, D>>> {
        let (mut calls, mut results) = (Vec::new(), Vec::new());
        for message in messages {
            let (call, result) = self.message(message)?;
            calls.push(call);
            results.push(result);
        }
        let flights = self.raw.start_batch(calls)?;
        Ok(flights.into_iter().zip(results).map(|(flight, result)| Pending { flight, result }).collect())
    }

    /// As [`start_messages`](Self::start_messages), where each message is followed by a second one of another type, between
    /// the same ranks.
    pub fn start_message_pairs<A: Element, B: Element>(
        &self,
        pairs: Vec<(Message<A, D>, Message<B, D>)>,
    ) -> Result<Vec<PendingPair<A, B, D>>> {
        let (mut calls, mut results) = (Vec::new(), Vec::new());
        for (first, second) in pairs {
            let ((first, of_first), (second, of_second)) = (self.message(first)?, self.message(second)?);
            calls.extend([first, second]);
            results.push((of_first, of_second));
        }
        let mut flights = self.raw.start_batch(calls)?.into_iter();
        let pairs = results.into_iter().map(|(first, second)| {
            let first = Pending { flight: flights.next()?, result: first };
            Some((first, Pending { flight: flights.next()?, result: second }))
        });
        Ok(pairs.flatten().collect())
    }

    /// The elementwise reduction of all ranks' `x`. For small control data: it goes over the device and waits, unless the group is
    /// of one rank.
    pub fn all_reduce_host<E: Element>(&self, x: &[E], reduction: Reduction) -> Result<Vec<E>> {
        if self.size() == 1 {
            return Ok(x.to_vec());
        }
        let x = Tensor::from_slice(self.device, 1, x.len(), x)?;
        Ok(self.all_reduce(&x, reduction)?.to_vec(self.device)?)
    }

    /// All ranks' `x`, equally long, in rank order. For small control data.
    pub fn all_gather_host<E: Element>(&self, x: &[E]) -> Result<Vec<E>> {
        let x = Tensor::from_slice(self.device, 1, x.len(), x)?;
        Ok(self.all_gather_rows(&x)?.to_vec(self.device)?)
    }

    /// `x` is one block for each rank, all equally long; the result is the blocks for this rank, in rank order. For
    /// small control data.
    pub fn all_to_all_host<E: Element>(&self, x: &[E]) -> Result<Vec<E>> {
        let (n, size) = (x.len(), self.size());
        if n % size != 0 {
            let what = format!("{n} elements are not {size} equal blocks");
            return Err(Error::Argument { op: "all_to_all", what });
        }
        let one_each = vec![1; size];
        let x = Tensor::from_slice(self.device, size, n / size, x)?;
        Ok(self.all_to_all_rows_v(&x, &one_each, &one_each)?.to_vec(self.device)?)
    }

    /// Starts an operation in which every rank sends, and receives `rows` rows as wide as what it sends.
    fn start<T: Element>(&self, op: Collective, x: &Tensor<T, D>, rows: usize) -> Result<Pending<T, D>> {
        let mut call = self.sending(op, x)?;
        let result = if self.size() == 1 {
            Expected::Sent(x.clone())
        } else {
            let cols = x.shape()[1];
            call.recv = Some(self.alloc::<T>(&call.op, rows, cols)?);
            Expected::Received { rows, cols }
        };
        Ok(Pending { flight: self.raw.start(call)?, result })
    }

    fn message<T: Element>(&self, message: Message<T, D>) -> Result<(Call<D>, Expected<T, D>)> {
        Ok(match message {
            Message::Send { to, tag, tensor } => {
                (self.sending(Collective::Send { to, tag }, &tensor)?, Expected::Sent(tensor))
            }
            Message::Recv { from, tag, rows, cols } => {
                let op = Collective::Recv { from, tag, count: product("recv", rows, cols)? };
                self.receiving(op, rows, cols)?
            }
        })
    }

    fn sending<T: Element>(&self, op: Collective, x: &Tensor<T, D>) -> Result<Call<D>> {
        let layout = x.layout();
        if !layout.is_contiguous() {
            let (rows, cols, stride) = (layout.rows, layout.cols, layout.stride);
            return Err(Error::NotContiguous { op: op.name(), rows, cols, stride });
        }
        let send = Some((x.buf().clone(), x.byte_range()));
        Ok(Call { group: self.key, op, dtype: T::DTYPE, cols: layout.cols, send, recv: None })
    }

    fn receiving<T: Element>(
        &self,
        op: Collective,
        rows: usize,
        cols: usize,
    ) -> Result<(Call<D>, Expected<T, D>)> {
        let recv = Some(self.alloc::<T>(&op, rows, cols)?);
        let call = Call { group: self.key, op, dtype: T::DTYPE, cols, send: None, recv };
        Ok((call, Expected::Received { rows, cols }))
    }

    fn alloc<T>(&self, op: &Collective, rows: usize, cols: usize) -> Result<D::Buf> {
        let bytes = product(op.name(), product(op.name(), rows, cols)?, size_of::<T>())?;
        Ok(self.device.alloc(bytes)?)
    }

    /// Also where `cols` is 0 and counts of elements say nothing.
    fn require_rows(&self, op: &Collective, n: usize, rows: &[usize]) -> Result<()> {
        let ranks = rows.len();
        if ranks != self.size() {
            return Err(argument(op, format!("{ranks} numbers of rows for a group of {}", self.size())));
        }
        let sum = sum(op.name(), rows)?;
        if sum != n {
            return Err(argument(op, format!("{n} rows where the numbers of rows sum to {sum}")));
        }
        Ok(())
    }
}

fn elements(op: &'static str, rows: &[usize], cols: usize) -> Result<Arc<[usize]>> {
    // If the largest product is not too large, none is.
    product(op, rows.iter().copied().max().unwrap_or(0), cols)?;
    Ok(rows.iter().map(|n| n * cols).collect())
}

fn argument(op: &Collective, what: String) -> Error {
    Error::Argument { op: op.name(), what }
}
