//! What the executor drives.

/// A pipeline stage: a part of the model with an explicit, split backward pass.
///
/// A stage holds no state of a step: what it needs for backward it returns as `Saved` and `Deferred`, and the rank's
/// context `Cx` (memory, parameters, gradients, communicators, the step's micro-batches) is lent to every call. So any
/// number of micro-batches can be in flight.
///
/// The executor calls each of them in ascending micro-batch order, so sums over micro-batches do not depend on the
/// schedule. An error ends the run: [`execute`](crate::execute()) aborts the transport and returns the error with its action.
///
/// ```
/// use std::{convert::Infallible, thread, time::Duration};
///
/// use moe_pipeline::{Stage, execute, generate, lower, transport, validate};
///
/// /// `y = w x` on single numbers, the micro-batches being 0, 1, 2, …; the loss is the last stage's `y² / 2`.
/// struct Scale { w: f64, first: bool, last: bool }
///
/// impl Stage for Scale {
///     type Cx = f64; // the sum of the gradients of `w`
///     type Act = f64;
///     type Saved = [f64; 2];
///     type Deferred = f64;
///     type Error = Infallible;
///
///     fn forward(&self, m: u32, x: Option<f64>, _: &mut f64) -> Result<(Option<f64>, [f64; 2]), Infallible> {
///         let x = x.unwrap_or(f64::from(m));
///         let y = self.w * x;
///         Ok(((!self.last).then_some(y), [x, y]))
///     }
///
///     fn backward_input(
///         &self, _: u32, dy: Option<f64>, [x, y]: [f64; 2], _: &mut f64,
///     ) -> Result<(Option<f64>, f64), Infallible> {
///         let dy = dy.unwrap_or(y); // of `y² / 2`
///         Ok(((!self.first).then_some(self.w * dy), x * dy))
///     }
///
///     fn backward_weight(&self, _: u32, dw: f64, sum: &mut f64) -> Result<(), Infallible> {
///         *sum += dw;
///         Ok(())
///     }
/// }
///
/// let program = validate(lower(&generate::one_f_one_b(2, 3)?)?, None)?;
/// let ranks = (0..).zip(transport::rendezvous(2, Duration::from_secs(10)));
/// let sums = thread::scope(|scope| {
///     let start = |(rank, mut channels)| {
///         let program = &program;
///         scope.spawn(move || {
///             let stage = Scale { w: f64::from(rank) + 2.0, first: rank == 0, last: rank == 1 };
///             let mut sum = 0.0;
///             execute(program, rank, &[stage], &mut channels, &mut sum).map(|()| sum)
///         })
///     };
///     let threads: Vec<_> = ranks.map(start).collect();
///     threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Result<Vec<_>, _>>()
/// });
/// // Of (2 · 3 · x)² / 2 for x = 0, 1, 2: the sum of 6x · 3x, and of 6x · 2x.
/// assert_eq!(sums.unwrap(), [18.0 * 5.0, 12.0 * 5.0]);
/// # Ok::<(), moe_pipeline::Error>(())
/// ```
#[expect(
    clippy::type_complexity,
    reason = "spelled out, the signatures read more easily than behind an alias"
)]
pub trait Stage {
    /// The rank's context.
    type Cx;
    /// What crosses stage boundaries: activations forward, their gradients backward.
    type Act;
    /// What forward keeps for [`Stage::backward_input`].
    type Saved;
    /// What [`Stage::backward_input`] keeps for [`Stage::backward_weight`].
    type Deferred;
    /// Why a call can fail.
    type Error;

    /// The forward pass of micro-batch `m`. `x` is the previous stage's output; the pipeline's first stage gets `None`
    /// and reads its micro-batch from `cx`. The last stage returns `None`: it keeps its loss in `cx`; all others return
    /// their output.
    fn forward(
        &self,
        m: u32,
        x: Option<Self::Act>,
        cx: &mut Self::Cx,
    ) -> Result<(Option<Self::Act>, Self::Saved), Self::Error>;

    /// The forward pass of a program that has no backward passes: nothing need be kept.
    fn forward_only(
        &self,
        m: u32,
        x: Option<Self::Act>,
        cx: &mut Self::Cx,
    ) -> Result<Option<Self::Act>, Self::Error> {
        Ok(self.forward(m, x, cx)?.0)
    }

    /// The gradient of the input of micro-batch `m`. `dy` is the gradient of the stage's output; the last stage gets
    /// `None` and starts from its loss. The first stage returns `None`, all others the gradient of their input.
    fn backward_input(
        &self,
        m: u32,
        dy: Option<Self::Act>,
        saved: Self::Saved,
        cx: &mut Self::Cx,
    ) -> Result<(Option<Self::Act>, Self::Deferred), Self::Error>;

    /// Adds the gradient of the weights of micro-batch `m` to those in `cx`.
    fn backward_weight(&self, m: u32, deferred: Self::Deferred, cx: &mut Self::Cx)
    -> Result<(), Self::Error>;

    /// Both halves at once, for schedules that do not part them. A stage of several layers may take them layer by layer,
    /// so that a layer's weight gradients are there, and what they needed is gone, while earlier layers are still at it.
    fn backward(
        &self,
        m: u32,
        dy: Option<Self::Act>,
        saved: Self::Saved,
        cx: &mut Self::Cx,
    ) -> Result<Option<Self::Act>, Self::Error> {
        let (dx, deferred) = self.backward_input(m, dy, saved, cx)?;
        self.backward_weight(m, deferred, cx)?;
        Ok(dx)
    }

    /// An [overlap](crate::Kind::Overlap): the forward pass of a micro-batch through this stage, `forward` being what
    /// [`forward`](Stage::forward) is given, and the backward pass of another micro-batch through `back`, a stage of the same rank and
    /// maybe this one, `backward` being what [`backward`](Stage::backward) is given; what both return. The passes do not need
    /// each other. A stage whose passes wait for other ranks (all-to-alls of experts) may [weave](mod@crate::weave) them, in an order
    /// that is the same on all those ranks; unless it does, they run one after the other.
    fn overlap(
        &self,
        forward: (u32, Option<Self::Act>),
        back: &Self,
        backward: (u32, Option<Self::Act>, Self::Saved),
        cx: &mut Self::Cx,
    ) -> Result<((Option<Self::Act>, Self::Saved), Option<Self::Act>), Self::Error> {
        let (m, x) = forward;
        let made = self.forward(m, x, cx)?;
        let (m, dy, saved) = backward;
        Ok((made, back.backward(m, dy, saved, cx)?))
    }
}
