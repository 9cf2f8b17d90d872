use moe_comm::Comm;
use moe_kernels::family::{Balance, DropLimit};
use moe_kernels::{Backend, Device, Float, Tensor, ViewMut};
use moe_topology::Attention;

use super::DropPolicy;
use crate::{Error, Routing, RoutingOn};

/// The ranks over which the tokens of a unit are spread.
pub struct Spread<'a, D: Device> {
    /// Their group.
    pub group: Comm<'a, Attention, D>,
    /// Tokens of each of them.
    pub tokens: &'a [usize],
}

/// Drops the choices beyond `limit`; returns what is left, and adds to `dropped: [1, 1]`, if it is asked for, how many of this rank's
/// choices were dropped.
///
/// `slots: [1, n]` are the slots of this rank's tokens, which say what unit a token belongs to and who comes first, as for
/// [`Routing::drop_excess`](moe_kernels::family::Routing::drop_excess) on a device. Where the tokens of a unit
/// are spread over ranks, choices, weights and slots are gathered over these, and every rank decides alike.
///
/// # Errors
/// Those of the kernel and of the group, among them that `spread` counts other tokens.
pub fn drop_excess<T: Float, D: Backend<T>>(
    device: &D,
    routing: RoutingOn<T, D>,
    policy: DropPolicy,
    slots: &Tensor<i32, D>,
    limit: DropLimit,
    spread: Option<Spread<'_, D>>,
    dropped: Option<ViewMut<'_, f64, D>>,
) -> Result<RoutingOn<T, D>, Error> {
    let Routing { experts, weights, tokens, top_k, shapes } = routing;
    let own = experts.reshape(tokens, top_k)?;
    let by = match policy {
        DropPolicy::Probs => Some(weights.reshape(tokens, top_k)?),
        DropPolicy::Position => None,
    };
    let kept = match spread {
        None => kept::<T, D>(device, &own, by.as_ref(), slots, limit)?,
        Some(Spread { group, tokens: counts }) => {
            let experts = group.start_all_gather_rows_v(&own, counts)?;
            let by = by.map(|by| group.start_all_gather_rows_v(&by, counts)).transpose()?;
            let slots = group.start_all_gather_rows_v(&slots.reshape(tokens, 1)?, counts)?;
            let (experts, by) = (experts.wait()?, by.map(|by| by.wait()).transpose()?);
            let all = kept::<T, D>(device, &experts, by.as_ref(), &slots.wait()?, limit)?;
            let first = counts[..group.rank()].iter().sum();
            all.rows(first..first + tokens)?
        }
    };
    if let Some(dropped) = dropped {
        Balance::<T::Acc>::count_dropped(device, dropped, own.view(), kept.view())?;
    }
    Ok(Routing { experts: kept, weights, tokens, top_k, shapes })
}

fn kept<T: Float, D: Backend<T>>(
    device: &D,
    experts: &Tensor<i32, D>,
    by: Option<&Tensor<T::Acc, D>>,
    slots: &Tensor<i32, D>,
    limit: DropLimit,
) -> Result<Tensor<i32, D>, Error> {
    let [tokens, top_k] = experts.shape();
    let mut kept = Tensor::uninit(device, tokens, top_k)?;
    let slots = slots.reshape(1, tokens)?;
    device.drop_excess(kept.view_mut()?, experts.view(), by.map(Tensor::view), slots.view(), limit)?;
    Ok(kept)
}
