//! A line of JSON.

use std::fmt;

use serde::Deserializer;
use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, Visitor};

/// The string that a field of an object has; none if it is `null`.
pub(crate) fn string_field(line: &[u8], field: &str) -> Result<Option<String>, String> {
    let line = std::str::from_utf8(line)
        .map_err(|error| format!("no UTF-8 at byte {} of the line", error.valid_up_to()))?;
    let line = line.trim_ascii_end();
    if line.is_empty() {
        return Err("an empty line".to_owned());
    }
    let mut json = serde_json::Deserializer::from_str(line);
    let found = Field(field).deserialize(&mut json).and_then(|found| json.end().map(|()| found));
    found.map_err(|error| json_fault(&error))
}

/// Reads an object, of which only one field counts.
struct Field<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for Field<'_> {
    type Value = Option<String>;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Self::Value, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Field<'_> {
    type Value = Option<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
        let mut found = None;
        while let Some(is_field) = map.next_key_seed(Key(self.0))? {
            match is_field {
                false => {
                    map.next_value::<IgnoredAny>()?;
                }
                true if found.is_some() => {
                    return Err(M::Error::custom(format_args!("two fields `{}`", self.0)));
                }
                true => found = Some(map.next_value()?),
            }
        }
        found.ok_or_else(|| M::Error::custom(format_args!("missing field `{}`", self.0)))
    }
}

/// Whether a key is the one.
struct Key<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for Key<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<bool, D::Error> {
        json.deserialize_str(self)
    }
}

impl Visitor<'_> for Key<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E>(self, key: &str) -> Result<bool, E> {
        Ok(key == self.0)
    }
}

/// What is wrong with a line.
pub(super) fn json_fault(error: &serde_json::Error) -> String {
    // It counts lines from the start of this one.
    let text = error.to_string();
    let what = text.split(" at line ").next().unwrap_or(&text);
    format!("{what} (column {})", error.column())
}
