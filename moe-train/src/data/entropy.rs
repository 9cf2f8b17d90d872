//! What a model without context could reach.

use std::collections::HashMap;

use super::{DataError, Tokens};

/// Entropy of token frequencies, −Σ p ln p, in nats per token (of byte tokens: per byte). The loss of the best model that
/// ignores context.
///
/// # Errors
/// The tokens cannot be read.
pub fn unigram_entropy(tokens: &Tokens) -> Result<f64, DataError> {
    let mut counts = HashMap::<u32, u64>::new();
    tokens.for_each_chunk(|tokens| {
        for &token in tokens {
            *counts.entry(token).or_default() += 1;
        }
        Ok(())
    })?;
    // In an order that is always the same, so that the sum is.
    let mut counts: Vec<u64> = counts.into_values().collect();
    counts.sort_unstable();
    let total = counts.iter().sum::<u64>() as f64;
    Ok(counts.iter().map(|&c| c as f64 / total).map(|p| -p * p.ln()).sum())
}

#[cfg(test)]
mod tests {
    use super::super::TokenFileWriter;
    use super::*;

    #[test]
    fn known_distributions() {
        let folder = tempfile::tempdir().unwrap();
        let entropy = |tokens: &[u32]| {
            let path = folder.path().join(format!("{tokens:?}"));
            let mut writer = TokenFileWriter::create(&path, 256).unwrap();
            writer.document(tokens).unwrap();
            writer.finish().unwrap();
            unigram_entropy(&Tokens::open(&path).unwrap()).unwrap()
        };
        assert_eq!(entropy(&[7, 7, 7]), 0.0);
        assert!((entropy(&[1, 2, 3, 255]) - 4_f64.ln()).abs() < 1e-15);
        // 1/2, 1/4, 1/4: 1.5 bits.
        assert!((entropy(&[9, 9, 0, 4]) - 1.5 * 2_f64.ln()).abs() < 1e-15);
    }
}
