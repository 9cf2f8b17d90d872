//! Features and foldings, any two of which meet in a listed case: in f64, each case gives what one rank gives.
//!
//! [`factors`] is the table of choices and of the rules that forbid some together; [`cover`] makes the list from it, which
//! is kept in `list.txt`: `MOE_WRITE_PAIRS=1 cargo test -p moe-train --test pairwise list` writes it.

#[path = "../common/mod.rs"]
mod common;

mod case;
mod cover;
mod factors;

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, LazyLock, Mutex};

use case::{Source, config, of_one_rank, parse, settings, setup, words};
use common::{Outcome, assert_equal, assert_same_metrics};
use cover::{BOUNDS, Bound, Draw, Item, Met, Row, cases, complete, forbidden_by, pairs};
use factors::{Choice, FACTORS};
use moe_train::trainer::Setup;
use proptest::prelude::*;

const STEPS: u64 = 2;
const LIST: &str = include_str!("list.txt");

static CASES: LazyLock<Vec<Row>> = LazyLock::new(cases);

fn name((factor, level): Item) -> String {
    format!("{} {}", FACTORS[factor].name, FACTORS[factor].levels[level].0)
}

/// The list as a text: cases by the levels that are not plain, then pairs that cannot meet, by the rule.
fn list() -> String {
    let mut text = String::from(
        "Cases in which any two choices meet that can. A factor that is not named has its plain level:\n",
    );
    let plain: Vec<String> = (0..FACTORS.len()).map(|factor| name((factor, 0))).collect();
    writeln!(text, "{}.\n", plain.join("; ")).unwrap();
    for (n, row) in CASES.iter().enumerate() {
        writeln!(text, "{:3}  {:2} ranks: {}", n + 1, Choice(row).world(), words(row)).unwrap();
    }
    writeln!(text, "\nPairs that cannot meet:").unwrap();
    let mut illegal: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (a, b) in pairs() {
        if let Some(rule) = forbidden_by((a, b)) {
            illegal.entry(rule.why).or_default().push(format!("{} with {}", name(a), name(b)));
        }
    }
    for (why, pairs) in illegal {
        writeln!(text, "\n{why}:\n  {}", pairs.join("\n  ")).unwrap();
    }
    text
}

#[test]
fn the_list_is_what_the_table_makes() {
    let list = list();
    if std::env::var_os("MOE_WRITE_PAIRS").is_some() {
        std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/pairwise/list.txt"), list).unwrap();
        return;
    }
    assert!(
        list == LIST,
        "the table makes another list: MOE_WRITE_PAIRS=1 cargo test -p moe-train --test pairwise"
    );
}

#[test]
fn any_two_choices_meet_unless_a_rule_forbids_it() {
    assert!(CASES.len() >= 120);
    let mut met = Met::default();
    CASES.iter().for_each(|row| met.add(row));
    for (a, b) in pairs() {
        let (times, rule) = (met.times(a, b), forbidden_by((a, b)));
        assert_eq!(times == 0, rule.is_some(), "{} with {}: {times} times", name(a), name(b));
    }
    for world in [24, 36] {
        assert!(CASES.iter().filter(|row| Choice(row).world() == world).count() >= 5, "{world} ranks");
    }
}

/// The configuration takes what the rules allow and refuses, for the rule's reason, what they forbid: each pair that is
/// left out, and random cases that break one rule.
#[test]
fn what_is_left_out_is_refused() {
    for row in CASES.iter() {
        config(row).unwrap_or_else(|refused| panic!("{}: {refused}", words(row)));
    }
    // Whether a case was found that breaks these rules at most; if so, that it is refused for one of their reasons.
    let refused = |rules: &[&Bound], given: &[Item], seed: u64| {
        let is_kept = |bound: &&Bound| rules.iter().all(|rule| rule.rule.why != bound.rule.why);
        let others: Vec<&Bound> = BOUNDS.iter().filter(is_kept).collect();
        let row = complete(given, &others, &mut Draw(seed), |_, factor, draw| draw.levels(factor));
        let broken = row.filter(|row| rules.iter().any(|bound| !(bound.rule.holds)(&Choice(row))));
        if let Some(row) = &broken {
            let error = config(row).expect_err(&words(row));
            let mut reasons = rules.iter().flat_map(|bound| bound.rule.refusals);
            assert!(reasons.any(|reason| error.contains(reason)), "{}: {error}", words(row));
        }
        broken.is_some()
    };
    for bound in BOUNDS.iter().filter(|bound| !bound.rule.refusals.is_empty()) {
        let broken = (0..20_000).filter(|&seed| refused(&[bound], &[], seed)).take(20).count();
        assert!(broken > 0, "{} is never broken", bound.rule.why);
    }
    for (a, b) in pairs() {
        let rules: Vec<&Bound> = BOUNDS.iter().filter(|bound| bound.forbids((a, b))).collect();
        let what = format!("{} with {}", name(a), name(b));
        let found = rules.is_empty() || (0..100).any(|seed| refused(&rules, &[a, b], seed));
        assert!(found, "{what} is left out, but nothing shows that it is refused");
    }
}

/// One rank's outcome of the same computation, made once.
fn reference(settings: Vec<String>) -> (Arc<Outcome>, Setup) {
    type Cache = HashMap<Vec<String>, Arc<Outcome>>;
    static DONE: LazyLock<Mutex<Cache>> = LazyLock::new(Mutex::default);
    let config = parse(&settings).unwrap();
    let known = DONE.lock().unwrap().get(&settings).cloned();
    let outcome = known.unwrap_or_else(|| {
        let source = Source::new(&config, &settings);
        let outcome = Arc::new(common::train_without_ties(setup(&config), STEPS, source));
        DONE.lock().unwrap().insert(settings, outcome.clone());
        outcome
    });
    (outcome, setup(&config))
}

fn train(settings: &[String]) -> Outcome {
    let config = parse(settings).unwrap();
    common::train_on(setup(&config), STEPS, Source::new(&config, settings))
}

fn check(row: &Row, what: &str) {
    let (reference, one) = reference(of_one_rank(row));
    let folded = train(&settings(row));
    assert_equal(&folded, &reference, &one, what);
    assert_same_metrics(&folded, &reference, what);
}

/// A part of the list, so that parts run beside each other; all that fail are named.
fn run(part: usize) {
    let mut failed = String::new();
    for (n, row) in CASES.iter().enumerate().filter(|(n, _)| n % 4 == part) {
        let what = format!("case {}, {} ranks: {}", n + 1, Choice(row).world(), words(row));
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| check(row, &what))) {
            let text = panic.downcast_ref::<String>().map_or("?", String::as_str);
            writeln!(failed, "\n{what}\n  {text}").unwrap();
        }
    }
    assert!(failed.is_empty(), "{failed}");
}

#[test]
fn a_quarter_of_the_list() {
    run(0);
}

#[test]
fn another_quarter_of_the_list() {
    run(1);
}

#[test]
fn a_third_quarter_of_the_list() {
    run(2);
}

#[test]
fn the_last_quarter_of_the_list() {
    run(3);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    /// Cases that are not listed.
    #[test]
    fn any_case(seed in any::<u64>()) {
        let rules: Vec<&Bound> = BOUNDS.iter().collect();
        let mut draw = Draw(seed);
        let row = (0..100).find_map(|_| complete(&[], &rules, &mut draw, |_, factor, draw| draw.levels(factor)));
        let row = row.expect("most cases are legal");
        check(&row, &words(&row));
    }
}
