//! moe-topology
