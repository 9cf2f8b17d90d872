//! Published schedules, as pure functions of their sizes, of compute actions only. [`Named`] chooses one by its name.
//!
//! | function | stages per rank | backward | for |
//! |---|---|---|---|
//! | [`gpipe`], [`breadth_first`] | 1, any | `B` | the simplest; keeps every activation |
//! | [`one_f_one_b`], [`interleaved_1f1b`] | 1, any | `B` | least memory for its idle time without splitting backward |
//! | [`overlapped_1f1b`] | any | `B`, in overlaps | MoE: all-to-alls of one pass hide behind the other |
//! | [`zb_h1`], [`interleaved_zero_bubble`] | 1, any | `I`, `W` | 1F1B's memory, a third of its idle time |
//! | [`zb_h2`] | 1 | `I`, `W` | no idle time for twice the memory |
//! | [`zb_v`] | 2 | `I`, `W` | no idle time for 1F1B's memory, on even stages |
//! | [`v_half`], [`v_min`] | 2 | `I`, `W` | half and a third of that memory, for some idle time |
//! | [`dual_pipe_v`] | 2 | `B`, `I`, `W`, in overlaps | overlaps through the whole step |
//! | [`dual_pipe`] | 1, twice | `B`, `I`, `W`, in overlaps | the same over two copies of the weights |
//! | [`forward_only`], [`interleaved_forward_only`] | 1, any | none | evaluation |

mod alternate;
mod controllable;
mod dual;
mod interleaved;
mod linear;
mod named;
mod turns;
mod zero_bubble;

pub use controllable::{v_half, v_min};
pub use dual::{dual_pipe, dual_pipe_v};
pub use interleaved::{breadth_first, interleaved_1f1b, interleaved_forward_only, overlapped_1f1b};
pub use linear::{forward_only, gpipe, one_f_one_b};
pub use named::{Named, Sizes};
pub use zero_bubble::{interleaved_zero_bubble, zb_h1, zb_h2, zb_v};
