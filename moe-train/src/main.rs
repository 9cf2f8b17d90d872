//! The `moe-train` command.

fn main() {}
