//! The crate's error type.

/// Result of every fallible call of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong on one device.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Shapes that do not fit together.
    #[error("{kernel}: {what}: expected {expected:?}, got {got:?}")]
    Shape {
        /// The kernel or constructor that refused.
        kernel: &'static str,
        /// Which operand or dimension.
        what: &'static str,
        /// Rows and columns that would fit.
        expected: [usize; 2],
        /// Rows and columns that were given.
        got: [usize; 2],
    },
    /// An argument outside its domain.
    #[error("{kernel}: {what}")]
    Argument {
        /// The kernel or constructor that refused.
        kernel: &'static str,
        /// What is wrong, with the values.
        what: String,
    },
    /// A byte range outside a buffer.
    #[error("bytes {start}..{end} lie outside a buffer of {len} bytes")]
    OutOfBounds {
        /// First byte asked for.
        start: usize,
        /// One past the last byte asked for.
        end: usize,
        /// Length of the buffer.
        len: usize,
    },
    /// A mutable view was asked of memory that somebody else still reads.
    #[error("the buffer is shared by {holders} holders and cannot be written in place")]
    Shared {
        /// Number of holders.
        holders: usize,
    },
    /// A value that no computation can go on from (a NaN router logit, say).
    #[error("{kernel}: not a number in row {row}")]
    NotANumber {
        /// The kernel that met it.
        kernel: &'static str,
        /// The row (token) that holds it.
        row: usize,
    },
    /// The device has no memory left.
    #[error("out of memory: {requested} bytes asked for, {live} bytes in use")]
    OutOfMemory {
        /// Bytes asked for.
        requested: usize,
        /// Bytes in use.
        live: usize,
    },
    /// The threads of a device could not be started.
    #[error("{threads} threads could not be started: {reason}")]
    Threads {
        /// Threads asked for.
        threads: usize,
        /// What the system said.
        reason: String,
    },
    /// A library that is loaded at run time is not on this machine.
    #[error("{library} was not found: {looked_for}; {fix}")]
    Library {
        /// Which library.
        library: &'static str,
        /// The names that were tried, and where.
        looked_for: String,
        /// How to get it.
        fix: &'static str,
    },
    /// There is no such device.
    #[error("there is no CUDA device {ordinal}: this process sees {count}")]
    NoDevice {
        /// The number that was asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The device or its driver lacks what this crate needs.
    #[error("unsupported: {what}")]
    Unsupported {
        /// What is there and what is needed.
        what: String,
    },
    /// The driver or a library of the device refused a call, or work issued before failed.
    #[error("{call}: {reason} (code {code})")]
    Driver {
        /// The call that returned it.
        call: &'static str,
        /// The library's code.
        code: i32,
        /// Its explanation.
        reason: String,
    },
    /// What was on the stream cannot come right any more; whoever found that ended all waits for it.
    #[error("interrupted: {why}")]
    Interrupted {
        /// Its reason.
        why: std::sync::Arc<str>,
    },
    /// Kernels that do not compile for a device.
    #[error("the kernels `{kernels}` do not compile for {architecture}:\n{log}")]
    Compile {
        /// The file of kernels.
        kernels: &'static str,
        /// What they were compiled for.
        architecture: String,
        /// What the compiler said.
        log: String,
    },
}
