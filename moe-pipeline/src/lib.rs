//! moe-pipeline
