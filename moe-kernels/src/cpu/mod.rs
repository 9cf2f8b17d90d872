//! The backend of every machine.
