//! `--dtype` of what computes on the host.

use std::fmt;

use clap::ValueEnum;

/// A type that the host computes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum HostDType {
    /// Single precision.
    F32,
    /// Double precision.
    F64,
}

impl fmt::Display for HostDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            HostDType::F32 => "f32",
            HostDType::F64 => "f64",
        })
    }
}
