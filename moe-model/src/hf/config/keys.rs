//! The keys of a JSON object, each read once; what nobody read is found in the end.

use std::collections::BTreeSet;
use std::fmt::Debug;

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

    /// A switch. `null` would be off in transformers, whatever the default: it is refused.
    pub fn flag(&mut self, key: &str) -> Result<Option<bool>> {
        let (value, wanted) = (Value::Null.to_string(), "true or false");
        match self.values.get(key) {
            Some(Value::Null) => Err(HubConfigError::Value { key: key.to_owned(), value, wanted }),
            _ => self.typed(key, wanted, Value::as_bool),
        }
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
        let sizes = keys.iter().map(|&key| Ok((key, self.size(key)?))).collect::<Result<Vec<_>>>()?;
        agreed(&sizes)?.ok_or(HubConfigError::Missing { key: keys[0] })
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

    /// Refuses what was not read.
    pub fn finish(self, place: &'static str) -> Result<()> {
        let unread = |(key, value): &(&String, &Value)| !value.is_null() && !self.read.contains(*key);
        match self.values.iter().find(unread) {
            Some((key, value)) => {
                Err(HubConfigError::Unknown { key: key.clone(), value: value.to_string(), place })
            }
            None => Ok(()),
        }
    }
}

/// What several spellings of one thing say.
///
/// # Errors
/// Two that are given differ.
pub(super) fn agreed<T: Copy + PartialEq + Debug>(
    spellings: &[(&'static str, Option<T>)],
) -> Result<Option<T>> {
    let mut given = spellings.iter().filter_map(|&(key, value)| Some((key, value?)));
    let Some((key, value)) = given.next() else { return Ok(None) };
    match given.find(|&(_, other)| other != value) {
        None => Ok(Some(value)),
        Some((other_key, other)) => {
            let values = [format!("{value:?}"), format!("{other:?}")];
            Err(HubConfigError::Spellings { keys: [key, other_key], values })
        }
    }
}
