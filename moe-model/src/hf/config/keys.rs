//! The keys of a JSON object, each read once; what nobody read is found in the end.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::HubConfigError;

type Result<T> = std::result::Result<T, HubConfigError>;

/// Keys that are being read. `null` is as good as absent.
pub(super) struct Keys<'a> {
    values: &'a Map<String, Value>,
    read: BTreeSet<String>,
}

impl<'a> Keys<'a> {
    pub fn new(values: &'a Map<String, Value>) -> Self {
        Keys { values, read: BTreeSet::new() }
    }

    pub fn value(&mut self, key: &str) -> Option<&'a Value> {
        self.read.insert(key.to_owned());
        self.values.get(key).filter(|value| !value.is_null())
    }

    /// Whether the key is there, be it `null`.
    pub fn has(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    fn typed<T>(
        &mut self,
        key: &str,
        wanted: &'static str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let refused = || HubConfigError::Value { key: key.to_owned(), value: value.to_string(), wanted };
        read(value).map(Some).ok_or_else(refused)
    }

    pub fn size(&mut self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a whole number of at least 0", |value| usize::try_from(value.as_u64()?).ok())
    }

    pub fn needed(&mut self, key: &'static str) -> Result<usize> {
        self.size(key)?.ok_or(HubConfigError::Missing { key })
    }

    pub fn number(&mut self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    pub fn flag(&mut self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    pub fn text(&mut self, key: &str) -> Result<Option<&'a str>> {
        self.typed(key, "text", Value::as_str)
    }

    pub fn object(&mut self, key: &str) -> Result<Option<&'a Map<String, Value>>> {
        self.typed(key, "an object", Value::as_object)
    }

    pub fn sizes(&mut self, key: &str) -> Result<Option<Vec<usize>>> {
        let size = |value: &Value| usize::try_from(value.as_u64()?).ok();
        self.typed(key, "a list of whole numbers", |value| value.as_array()?.iter().map(size).collect())
    }

    /// A size under any of several names.
    pub fn spelled(&mut self, keys: &[&'static str]) -> Result<usize> {
        let mut found: Option<(&'static str, usize)> = None;
        for key in keys {
            match (self.size(key)?, found) {
                (Some(size), Some((other, before))) if size != before => {
                    let values = [before.to_string(), size.to_string()];
                    return Err(HubConfigError::Spellings { keys: [other, key], values });
                }
                (Some(size), _) => found = Some((key, size)),
                (None, _) => {}
            }
        }
        found.map(|(_, size)| size).ok_or(HubConfigError::Missing { key: keys[0] })
    }

    /// Refuses a key unless it is absent or `may` be as it is.
    pub fn only(&mut self, key: &str, why: &'static str, may: impl FnOnce(&Value) -> bool) -> Result<()> {
        match self.value(key) {
            Some(value) if !may(value) => {
                Err(HubConfigError::Unsupported { key: key.to_owned(), value: value.to_string(), why })
            }
            _ => Ok(()),
        }
    }

    /// Passes over keys that change nothing that is computed.
    pub fn ignore(&mut self, keys: &[&str]) {
        self.read.extend(keys.iter().map(|&key| key.to_owned()));
    }

    /// Refuses what was not read. Names that begin with `_` are transformers' own.
    pub fn finish(self, place: &'static str) -> Result<()> {
        let unread = |(key, value): &(&String, &Value)| {
            !value.is_null() && !self.read.contains(*key) && !key.starts_with('_')
        };
        match self.values.iter().find(unread) {
            Some((key, value)) => {
                Err(HubConfigError::Unknown { key: key.clone(), value: value.to_string(), place })
            }
            None => Ok(()),
        }
    }
}
