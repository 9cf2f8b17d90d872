//! Published schedules, as pure functions of their sizes, of compute actions only. [`Named`] chooses one by its name.
//!
//! | function | stages per rank | backward | for |
//! |---|---|---|---|
//! | [`gpipe`], [`breadth_first`] | 1, any | `B` | the simplest; keeps every activation |
//! | [`one_f_one_b`], [`interleaved_1f1b`] | 1, any | `B` | least memory for its idle time without splitting backward |
//! | [`overlapped_1f1b`] | any | `B`, in overlaps | MoE: all-to-alls of one pass hide behind the other |
//! | [`zb_h1`], [`interleaved_zero_bubble`] | 1, any | `I`, `W` | 1F1B's memory, a third of its idle time at f = i = w |
//! | [`zb_h2`] | 1 | `I`, `W` | no idle time for twice the memory |
//! | [`zb_v`] | 2 | `I`, `W` | no idle time for 1F1B's memory, on even stages |
//! | [`v_half`], [`v_min`] | 2 | `I`, `W` | half and a third of that memory, for some idle time |
//! | [`dual_pipe_v`] | 2 | `B`, `I`, `W`, in overlaps | overlaps through the whole step |
//! | [`dual_pipe`] | 1, twice | `B`, `I`, `W`, in overlaps | the same over two copies of the weights |
//! | [`for_costs`] | any | `I`, `W`, or as published | the shortest step found for measured costs and a memory limit |
//! | [`forward_only`], [`forward_only_over`] | 1, any | none | evaluation |
//!
//! # A tour
//!
//! Every pass of one kind takes a unit of time here, two characters; a block begins with its micro-batch: `-` is forward, `=` an
//! input gradient, `~` a weight gradient, `===` both as one, `#####` forward overlapped with backward; dots are idle. Below each picture
//! are the length of the step and the most activations of a stage that each rank keeps.
//!
//! GPipe goes forward through everything, then backward. Ranks idle (p−1)(f+b) and keep all m micro-batches.
//!
//! ```text
//! gpipe, 3 ranks, 1 stage per rank, 4 micro-batches
//! rank 0 0-1-2-3-............0===1===2===3===
//! rank 1 ..0-1-2-3-......0===1===2===3===....
//! rank 2 ....0-1-2-3-0===1===2===3===........
//! step 18, kept 4 4 4
//! ```
//!
//! 1F1B takes a micro-batch backward as soon as it can. It takes as long, but rank r keeps only p−r, however many there are.
//!
//! ```text
//! 1f1b, 3 ranks, 1 stage per rank, 4 micro-batches
//! rank 0 0-1-2-........0===3-1===..2===..3===
//! rank 1 ..0-1-....0===2-1===3-2===..3===....
//! rank 2 ....0-0===1-1===2-2===3-3===........
//! step 18, kept 3 2 1
//! ```
//!
//! Several stages per rank, each a part of its layers: ranks still idle (p−1)(f+b), but of passes 1/v as long (here the step takes 30
//! half-units, which are 15 of the units above), for more activations and messages.
//!
//! ```text
//! interleaved-1f1b, 3 ranks, 2 stages per rank, 4 micro-batches
//! rank 0 0-1-2-3-0-1-2-3-......0===..1===..2===..3===0===1===2===3===
//! rank 1 ..0-1-2-3-0-1-2-..0===3-1===..2===..3===0===1===2===3===....
//! rank 2 ....0-1-2-3-0-0===1-1===2-2===3-3===0===1===2===3===........
//! step 30, kept 8 7 5
//! ```
//!
//! Only input gradients are waited for. If backward is split, weight gradients can fill gaps: ZB-H1 keeps no more than the first
//! rank of 1F1B and idles a third; ZB-H2 goes further ahead and idles only to begin and to end.
//!
//! ```text
//! zb-h1, 3 ranks, 1 stage per rank, 4 micro-batches
//! rank 0 0-1-2-....0=0~3-1=1~2=2~3=3~
//! rank 1 ..0-1-..0=2-1=0~3-2=1~3=2~3~
//! rank 2 ....0-0=1-1=2-2=0~3-3=1~2~3~
//! step 14, kept 3 3 3
//! ```
//!
//! ```text
//! zb-h2, 3 ranks, 1 stage per rank, 5 micro-batches
//! rank 0 0-1-2-3-4-0=0~1=1~2=2~3=3~4=4~....
//! rank 1 ..0-1-2-0=3-1=4-2=0~3=1~4=2~3~4~..
//! rank 2 ....0-0=1-1=2-2=3-3=4-4=0~1~2~3~4~
//! step 17, kept 5 5 5
//! ```
//!
//! If the second stage of a rank is placed so that the pipeline comes back, the first rank has the loss, and backward begins there.
//! ZB-V idles only to begin and to end, with the memory of 1F1B (a stage is half of a rank's layers); V-Half takes half of that.
//!
//! ```text
//! zb-v, 3 ranks, 2 stages per rank, 5 micro-batches
//! rank 0 0-1-2-3-4-0-0=0~1-1=1~2-2=2~0=0~3-3=3~1=1~4-4=4~2=2~3=3~4=4~....
//! rank 1 ..0-1-2-0-3-1-0=0~2-1=1~4-0=0~3-2=2~1=1~4-3=3~2=4=3=2~4=3~4~4~..
//! rank 2 ....0-0-1-1-2-2-0=0~3-0=0~3-1=1~4-1=1~4-2=2~2=3=3=4=4=2~3~4~3~4~
//! step 32, kept 6 6 6
//! ```
//!
//! ```text
//! v-half, 3 ranks, 2 stages per rank, 6 micro-batches
//! rank 0 0-1-2-....0-0=0~1-1=1~0=3-0~..2-2=1=2~4-1~3-3=2=3~5-2~4-4=3=4~3~..5-5=4=5~4~..5=5~
//! rank 1 ..0-1-..0-..1-0=0~2-0=1=0~1~2-3-1=2=1~2~3-4-2=3=2~3~4-5-3=4=3~4~5-..4=5=4~5~5=5~..
//! rank 2 ....0-0-1-1-....0=0=0~2-0~2-1=1=1~3-1~3-2=2=2~4-2~4-3=3=3~5-3~5-4=4=4~4~5=5=5~5~..
//! step 41, kept 4 4 4
//! ```
//!
//! In an MoE layer the all-to-alls of a forward pass can hide behind what a backward pass computes, if they are of different
//! micro-batches. DualPipeV overlaps the two stages of a V so; 1F1B does if ranks go one pass further ahead.
//!
//! ```text
//! dual-pipe-v, 3 ranks, 2 stages per rank, 6 micro-batches
//! rank 0 0-1-2-3-4-0-0=0~1-1=1~2-5#####....3#####3===..4#####4===..5#####5===3=3~4=4~5=5~
//! rank 1 ..0-1-2-0-3-1-0=0~2-4#####..3#####5#####4#####3===..5#####4===3===..5=4=5~5=4~5~
//! rank 2 ....0-0-1-1-2-2-3-0===3#####4#####4#####5#####5#####3===3===..4===4=..5=5=4~5~5~
//! step 40, kept 7 7 7
//! ```
//!
//! ```text
//! overlapped-1f1b, 3 ranks, 1 stage per rank, 6 micro-batches
//! rank 0 0-1-2-3-4-........5#####1===..2===3===..4===5===
//! rank 1 ..0-1-2-....3#####4#####5#####3===..4===5===....
//! rank 2 ....0-1#####2#####3#####4#####5#####5===........
//! step 24, kept 6 4 2
//! ```

mod alternate;
mod controllable;
mod dual;
mod interleaved;
mod linear;
mod list;
mod named;
mod turns;
mod zero_bubble;

pub use controllable::{v_half, v_min};
pub use dual::{dual_pipe, dual_pipe_v};
pub use interleaved::{breadth_first, interleaved_1f1b, overlapped_1f1b};
pub use linear::{forward_only, forward_only_over, gpipe, one_f_one_b};
pub use list::for_costs;
pub use named::{Named, Sizes};
pub use zero_bubble::{interleaved_zero_bubble, zb_h1, zb_h2, zb_v};
