//! A list of cases in which any two levels meet that can: greedily, as AETG (Cohen et al., 1997), with a fixed seed.

use std::sync::LazyLock;

use crate::factors::{Choice, FACTORS, LARGE, RULES, Rule, factor_named};

/// A level of each factor.
pub type Row = Vec<usize>;

/// (factor, level).
pub type Item = (usize, usize);

const OPEN: usize = usize::MAX;
/// Cases, at least.
const CASES: usize = 120;
/// Candidates for each case, of which the one with most new pairs is taken.
const CANDIDATES: usize = 24;
/// Levels that are tried for a candidate: in an unlucky order of factors the search would take long.
const TRIALS: usize = 300;

/// All pairs of levels of two factors.
pub fn pairs() -> impl Iterator<Item = (Item, Item)> {
    let items = || (0..FACTORS.len()).flat_map(|f| (0..FACTORS[f].levels.len()).map(move |level| (f, level)));
    items().flat_map(move |a| items().filter(move |b| a.0 < b.0).map(move |b| (a, b)))
}

/// A rule, and the factors that it looks at.
pub struct Bound {
    pub rule: &'static Rule,
    factors: Vec<usize>,
}

/// All rules.
pub static BOUNDS: LazyLock<Vec<Bound>> = LazyLock::new(|| {
    let bound =
        |rule: &'static Rule| Bound { rule, factors: rule.factors.iter().map(|f| factor_named(f)).collect() };
    RULES.iter().map(bound).collect()
});

impl Bound {
    /// Whether two levels break the rule whatever the others are.
    pub fn forbids(&self, (a, b): (Item, Item)) -> bool {
        if !self.factors.contains(&a.0) && !self.factors.contains(&b.0) {
            return false;
        }
        let mut row = vec![OPEN; FACTORS.len()];
        (row[a.0], row[b.0]) = (a.1, b.1);
        let open = self.factors.iter().copied().filter(|&f| row[f] == OPEN).collect();
        let all = |_: &Row, factor: usize| (0..FACTORS[factor].levels.len()).collect();
        !extend(&mut row, open, &[self], &mut { usize::MAX }, &all)
    }
}

/// The first rule that forbids two levels.
pub fn forbidden_by(pair: (Item, Item)) -> Option<&'static Rule> {
    BOUNDS.iter().find(|bound| bound.forbids(pair)).map(|bound| bound.rule)
}

/// Chooses levels for the `open` factors, the last one first, each of those that `levels` proposes, so that all rules hold
/// whose factors are chosen; false if there are none, or none was found in `trials` choices.
fn extend(
    row: &mut Row,
    mut open: Vec<usize>,
    rules: &[&Bound],
    trials: &mut usize,
    levels: &impl Fn(&Row, usize) -> Vec<usize>,
) -> bool {
    let holds = |row: &Row, bound: &Bound| {
        bound.factors.iter().any(|&f| row[f] == OPEN) || (bound.rule.holds)(&Choice(row))
    };
    let Some(factor) = open.pop() else {
        return rules.iter().all(|bound| holds(row, bound));
    };
    for level in levels(row, factor) {
        if *trials == 0 {
            return false;
        }
        *trials -= 1;
        row[factor] = level;
        let mut concerned = rules.iter().filter(|bound| bound.factors.contains(&factor));
        if concerned.all(|bound| holds(row, bound)) && extend(row, open.clone(), rules, trials, levels) {
            return true;
        }
    }
    row[factor] = OPEN;
    false
}

/// A case with the given levels that breaks no rule of `rules`, if one is found; the others are chosen by `levels`.
pub fn complete(
    given: &[Item],
    rules: &[&Bound],
    draw: &mut Draw,
    levels: impl Fn(&Row, usize, &mut Draw) -> Vec<usize>,
) -> Option<Row> {
    let mut row = vec![OPEN; FACTORS.len()];
    given.iter().for_each(|&(factor, level)| row[factor] = level);
    // Factors that rules tie are chosen first: the last of the list is the first to go.
    let tied = |f: &usize| rules.iter().any(|bound| bound.factors.contains(f));
    let (mut tied, mut free): (Vec<usize>, Vec<usize>) =
        (0..FACTORS.len()).filter(|&f| row[f] == OPEN).partition(tied);
    draw.shuffle(&mut tied);
    draw.shuffle(&mut free);
    free.append(&mut tied);
    let draw = std::cell::RefCell::new(draw);
    extend(&mut row, free, rules, &mut { TRIALS }, &|row, f| levels(row, f, &mut draw.borrow_mut()))
        .then_some(row)
}

/// The list.
pub fn cases() -> Vec<Row> {
    let rules: Vec<&Bound> = BOUNDS.iter().collect();
    let mut met = Met::default();
    let mut missing: Vec<(Item, Item)> = pairs().filter(|&pair| forbidden_by(pair).is_none()).collect();
    let (mut draw, mut rows, mut fruitless) = (Draw(20_251_124), Vec::new(), 0);
    while rows.len() < CASES || !missing.is_empty() {
        let best = (0..CANDIDATES)
            .filter_map(|_| {
                let given = match (LARGE.get(rows.len()), missing.len()) {
                    (Some(folding), _) => {
                        folding.iter().map(|&(factor, level)| item(factor, level)).collect()
                    }
                    (None, 0) => Vec::new(),
                    (None, n) => {
                        let (a, b) = missing[draw.below(n)];
                        vec![a, b]
                    }
                };
                let row = complete(&given, &rules, &mut draw, |row, f, draw| met.rarest_first(row, f, draw))?;
                // A large world must be worth its time.
                Some((10 * met.gain(&row) as i64 - Choice(&row).world().max(12) as i64, row))
            })
            .max_by_key(|(worth, _)| *worth);
        fruitless = if best.is_none() { fruitless + 1 } else { 0 };
        assert!(fruitless < 100, "no case for {:?}", missing.first());
        let Some((_, row)) = best else { continue };
        met.add(&row);
        missing.retain(|&(a, b)| met.times(a, b) == 0);
        rows.push(row);
    }
    rows
}

pub fn item(factor: &str, level: &str) -> Item {
    let factor = factor_named(factor);
    let found = FACTORS[factor].levels.iter().position(|known| known.0 == level);
    (factor, found.unwrap_or_else(|| panic!("no level {level}")))
}

/// How often pairs met.
pub struct Met {
    /// Where a factor's levels begin among all.
    first: Vec<usize>,
    /// A square of all levels.
    times: Vec<u32>,
}

impl Default for Met {
    fn default() -> Self {
        let (mut first, mut sum) = (Vec::new(), 0);
        for factor in FACTORS {
            first.push(sum);
            sum += factor.levels.len();
        }
        Met { first, times: vec![0; sum * sum] }
    }
}

impl Met {
    fn at(&self, a: Item, b: Item) -> usize {
        let (a, b) = (a.min(b), a.max(b));
        let side = self.times.len().isqrt();
        (self.first[a.0] + a.1) * side + self.first[b.0] + b.1
    }

    pub fn times(&self, a: Item, b: Item) -> usize {
        self.times[self.at(a, b)] as usize
    }

    pub fn add(&mut self, row: &Row) {
        each_pair(row, |a, b| {
            let at = self.at(a, b);
            self.times[at] += 1;
        });
    }

    /// Pairs that would meet for the first time; for the second, where that is none.
    fn gain(&self, row: &Row) -> usize {
        let mut seen = [0; 2];
        each_pair(row, |a, b| {
            if let Some(count) = seen.get_mut(self.times(a, b)) {
                *count += 1;
            }
        });
        if seen[0] > 0 { seen[0] } else { seen[1] / 4 }
    }

    /// The levels of a factor, those that bring most new pairs first.
    fn rarest_first(&self, row: &Row, factor: usize, draw: &mut Draw) -> Vec<usize> {
        let mut levels = draw.levels(factor);
        let chosen = || row.iter().enumerate().filter(|(f, level)| *f != factor && **level != OPEN);
        levels.sort_by_cached_key(|&level| {
            let mut seen = [0; 2];
            for (f, &other) in chosen() {
                if let Some(count) = seen.get_mut(self.times((factor, level), (f, other))) {
                    *count += 1;
                }
            }
            std::cmp::Reverse(seen)
        });
        levels
    }
}

fn each_pair(row: &Row, mut act: impl FnMut(Item, Item)) {
    for (f, &level) in row.iter().enumerate() {
        for (g, &other) in row.iter().enumerate().skip(f + 1) {
            act((f, level), (g, other));
        }
    }
}

/// A generator of random numbers, the same on every platform (splitmix64).
pub struct Draw(pub u64);

impl Draw {
    pub fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % n as u64) as usize
    }

    /// The levels of a factor in any order.
    pub fn levels(&mut self, factor: usize) -> Vec<usize> {
        let mut levels: Vec<usize> = (0..FACTORS[factor].levels.len()).collect();
        self.shuffle(&mut levels);
        levels
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}
