//! Pipeline layouts as text, in Megatron's notation.

use std::ops::Range;

use crate::{Error, Result};

/// What a layout may have once repetitions are written out: far more than any model, and little memory.
const LIMIT: usize = 1 << 16;

/// A letter and the column it was written in.
type Placed = (char, usize);

struct Parser<'a> {
    text: &'a str,
    /// Repetitions written out.
    placed: Vec<Placed>,
}

/// The layers of each stage of a layout such as `Et*3|(tt|)*29,t|L`: `E` is the embedding, `t` a layer, `L` the head and its
/// loss, `|` begins the next stage; `x*n` and `(…)*n` repeat; commas mean nothing.
///
/// # Errors
/// [`Error::LayoutText`], which shows the place.
pub(super) fn layers_per_stage(text: &str) -> Result<Vec<usize>> {
    let mut parser = Parser { text, placed: Vec::new() };
    parser.write_out()?;
    parser.stages()
}

impl Parser<'_> {
    fn error<T>(&self, column: usize, what: impl Into<String>) -> Result<T> {
        Err(Error::LayoutText { text: self.text.to_owned(), column, what: what.into() })
    }

    /// Reads the text, repetitions written out.
    fn write_out(&mut self) -> Result<()> {
        let mut group: Option<(usize, usize)> = None;
        // What a `*` that comes next would repeat.
        let mut last: Option<Range<usize>> = None;
        let mut chars = (1..).zip(self.text.chars()).peekable();
        while let Some((column, letter)) = chars.next() {
            match letter {
                ',' => {}
                'E' | 't' | 'L' | '|' => {
                    self.placed.push((letter, column));
                    last = Some(self.placed.len() - 1..self.placed.len());
                }
                'm' => {
                    return self.error(column, "prediction of several tokens (m) is not built: leave it out");
                }
                '(' => match group {
                    Some(_) => return self.error(column, "a ( within another"),
                    None => (group, last) = (Some((self.placed.len(), column)), None),
                },
                ')' => match group.take() {
                    Some((start, _)) if start < self.placed.len() => last = Some(start..self.placed.len()),
                    Some(_) => return self.error(column, "nothing between ( and )"),
                    None => return self.error(column, "a ) without its ("),
                },
                '*' => {
                    let mut digits = String::new();
                    while let Some((_, digit)) = chars.next_if(|(_, next)| next.is_ascii_digit()) {
                        digits.push(digit);
                    }
                    let Some(repeated) = last.take() else {
                        return self.error(column, "a * needs a letter, a | or a ) before it");
                    };
                    match digits.parse() {
                        Ok(times) if times > 0 => self.repeat(repeated, times, column)?,
                        _ => return self.error(column, "a * needs a number from 1 on behind it"),
                    }
                }
                other => {
                    let what = format!(
                        "{other:?} is none of E (embedding), t (layer), L (loss), | (next stage), (…), *n and commas"
                    );
                    return self.error(column, what);
                }
            }
        }
        match group {
            Some((_, column)) => self.error(column, "a ( without its )"),
            None => Ok(()),
        }
    }

    fn repeat(&mut self, repeated: Range<usize>, times: usize, column: usize) -> Result<()> {
        let more = repeated.len().saturating_mul(times - 1);
        if more > LIMIT - self.placed.len().min(LIMIT) {
            return self.error(column, format!("more than {LIMIT} letters, repetitions written out"));
        }
        for _ in 1..times {
            self.placed.extend_from_within(repeated.clone());
        }
        Ok(())
    }

    /// Counts layers.
    fn stages(&self) -> Result<Vec<usize>> {
        let end = self.text.chars().count() + 1;
        let Some((&(first, column), rest)) = self.placed.split_first() else {
            return self.error(1, "no stage at all");
        };
        if first != 'E' {
            return self.error(column, "a layout begins with E: the embedding is on the first stage");
        }
        let mut stages = vec![0];
        let mut ended = false;
        for &(letter, column) in rest {
            let (stage, layers) = (stages.len() - 1, stages[stages.len() - 1]);
            match letter {
                _ if ended => {
                    return self.error(column, "a layout ends with L: the head is on the last stage");
                }
                'E' => return self.error(column, "a second E: there is one embedding"),
                'L' => ended = true,
                '|' if stage > 0 && layers == 0 => {
                    let what = format!(
                        "stage {stage} has no layer: only the first (with the embedding) and the last (with the head) \
                         may have none, any other would pass on what it gets"
                    );
                    return self.error(column, what);
                }
                '|' => stages.push(0),
                _ => stages[stage] += 1,
            }
        }
        match ended {
            true => Ok(stages),
            false => self.error(end, "a layout ends with L: the head is on the last stage"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_have_the_layers_that_are_written() {
        for (text, want) in [
            ("EtL", vec![1]),
            ("EL", vec![0]),
            ("Et|tt|L", vec![1, 2, 0]),
            ("E|t*2|,,tL", vec![0, 2, 1]),
            ("Et*3|(t,t|)*2t|L", vec![3, 2, 2, 1, 0]),
            ("E(t*2|)*3tL", vec![2, 2, 2, 1]),
            // Megatron's documentation, but for its module for prediction of several tokens.
            ("Et*3|(tt|)*29,t|L", [&[3][..], &[2; 29], &[1, 0]].concat()),
            ("E(t|)*12L", [&[1; 12][..], &[0]].concat()),
        ] {
            assert_eq!(layers_per_stage(text).unwrap(), want, "{text}");
        }
    }

    #[test]
    fn errors_point_at_the_place() {
        for (text, place, what) in [
            ("Et*3|(tt|)*29,m|L", 15, "prediction of several tokens (m) is not built"),
            ("", 1, "no stage at all"),
            (",", 1, "no stage at all"),
            ("tt|L", 1, "begins with E"),
            ("Et|tEL", 5, "a second E"),
            ("Et|t", 5, "ends with L"),
            ("EtL|t", 4, "ends with L"),
            ("EtLL", 4, "ends with L"),
            ("Et||tL", 4, "stage 1 has no layer"),
            ("Et|*2tL", 3, "stage 1 has no layer"),
            ("Et|(t|tL", 4, "a ( without its )"),
            ("Et|t)*2L", 5, "a ) without its ("),
            ("E(t(t))*2L", 4, "a ( within another"),
            ("E()*2tL", 3, "nothing between ( and )"),
            ("E*tL", 2, "a * needs a number from 1 on behind it"),
            ("Et*0L", 3, "a * needs a number from 1 on behind it"),
            ("*2EtL", 1, "a * needs a letter"),
            ("Et*2*3L", 5, "a * needs a letter"),
            ("Et*99999999999999999999L", 3, "a * needs a number"),
            ("Et*4000000000L", 3, "more than 65536 letters"),
            ("E(t*60000|)*60000L", 12, "more than 65536 letters"),
            ("Et tL", 3, "' ' is none of"),
            ("Eé|tL", 2, "'é' is none of"),
        ] {
            match layers_per_stage(text) {
                Err(Error::LayoutText { column, what: got, .. }) => {
                    assert!(column == place && got.contains(what), "{text}: {column}, {got}");
                }
                other => panic!("{text}: {other:?}"),
            }
        }
        assert_eq!(
            layers_per_stage("Et||tL").unwrap_err().to_string().lines().skip(1).collect::<Vec<_>>(),
            ["  Et||tL", "     ^"]
        );
    }
}
