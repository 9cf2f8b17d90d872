//! Random numbers by counter: what is drawn depends on a key and a place, not on what was drawn before.

/// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", 2011).
#[inline]
pub fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = 0xD251_1F53_u64 * counter[0] as u64;
        let b = 0xCD9E_8D57_u64 * counter[2] as u64;
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

/// Two uniform numbers above 0 and below 1, of 53 bits: those of the elements `2·pair` and `2·pair + 1` of `stream`.
#[inline]
pub fn uniform_pair(key: u64, stream: u64, pair: u64) -> [f64; 2] {
    let words = |x: u64| [x as u32, (x >> 32) as u32];
    let ([p, q], [s, t]) = (words(pair), words(stream));
    let [a, b, c, d] = philox4x32_10([p, q, s, t], words(key));
    let uniform = |low: u32, high: u32| {
        let bits = ((high as u64) << 32 | low as u64) >> 11;
        (bits as f64 + 0.5) / (1u64 << 53) as f64
    };
    [uniform(a, b), uniform(c, d)]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known-answer vectors that the authors distribute with Random123.
    #[test]
    fn philox_known_answers() {
        assert_eq!(philox4x32_10([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox4x32_10([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32_10([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn uniform_numbers_are_even_and_their_streams_apart() {
        let n = 50_000;
        let (mut mean, mut square, mut cross) = (0.0, 0.0, 0.0);
        for i in 0..n {
            let [a, b] = uniform_pair(7, i % 100, i / 100);
            let [c, _] = uniform_pair(7, 1 << 40 | (i % 100), i / 100);
            assert!([a, b, c].iter().all(|x| (0.0..1.0).contains(x) && *x > 0.0));
            mean += (a + b) / 2.0 / n as f64;
            square += (a * a + b * b) / 2.0 / n as f64;
            cross += ((a - 0.5) * (b - 0.5) + (a - 0.5) * (c - 0.5)) / n as f64;
        }
        // five standard errors each
        let error = |variance: f64| 5.0 * (variance / n as f64).sqrt();
        assert!((mean - 0.5).abs() < error(1.0 / 24.0), "{mean}");
        assert!((square - 1.0 / 3.0).abs() < error(2.0 / 45.0), "{square}");
        assert!(cross.abs() < error(2.0 / 144.0), "{cross}");
        assert_ne!(uniform_pair(7, 1, 2), uniform_pair(8, 1, 2));
    }
}
