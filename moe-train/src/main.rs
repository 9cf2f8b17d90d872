//! The `moe-train` command.

use std::process::ExitCode;

use clap::Parser;
use moe_train::command::{Cli, exit_status};

fn main() -> ExitCode {
    match Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(exit_status(&error))
        }
    }
}
