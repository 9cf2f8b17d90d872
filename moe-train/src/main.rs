//! The `moe-train` command.

use std::process::ExitCode;

use clap::Parser;
use moe_train::command::{Cli, exit_status, message};

fn main() -> ExitCode {
    match Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if let Some(message) = message(&error) {
                eprintln!("error: {message}");
            }
            ExitCode::from(exit_status(&error))
        }
    }
}
