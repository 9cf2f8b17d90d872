//! Compiled kernels on disk.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Where compiled kernels are kept: `$MOE_KERNEL_CACHE`, else `$XDG_CACHE_HOME/moe-kernels`, else `~/.cache/moe-kernels`. `None` where
/// none of the three is set; kernels are then compiled by every process.
pub fn cache_dir() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("MOE_KERNEL_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|dir| dir.join("moe-kernels")))
        .or_else(|| set("HOME").map(|dir| dir.join(".cache/moe-kernels")))
}

/// Bytes of the hash before the content.
const HASH: usize = blake3::OUT_LEN;

/// The content of `dir/name`, if it is there and whole.
pub(super) fn read(dir: &Path, name: &str) -> Option<Vec<u8>> {
    let mut file = fs::read(dir.join(name)).ok()?;
    let content = file.get(HASH..)?;
    if blake3::hash(content).as_bytes() != &file[..HASH] {
        return None;
    }
    file.drain(..HASH);
    Some(file)
}

/// Keeps `content` as `dir/name`. It is there as a whole or not at all, whatever other processes do; where it cannot be written (a full
/// disk, a folder of somebody else), it is compiled again next time.
pub(super) fn write(dir: &Path, name: &str, content: &[u8]) -> std::io::Result<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    create(dir)?;
    let temporary =
        dir.join(format!(".{name}.{}.{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
    let written = fs::File::create_new(&temporary).and_then(|mut file| {
        file.write_all(blake3::hash(content).as_bytes())?;
        file.write_all(content)?;
        file.sync_all()
    });
    written.and_then(|()| fs::rename(&temporary, dir.join(name))).inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

/// A folder that only its owner may write: what lies in it is run on the GPU.
#[cfg(unix)]
fn create(dir: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

#[cfg(not(unix))]
fn create(dir: &Path) -> std::io::Result<()> {
    fs::create_dir_all(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_what_is_damaged_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("a/b");
        assert_eq!(read(&dir, "k.cubin"), None);
        let content: Vec<u8> = (0..5000).map(|i| i as u8).collect();
        write(&dir, "k.cubin", &content).unwrap();
        assert_eq!(read(&dir, "k.cubin").unwrap(), content);
        write(&dir, "k.cubin", b"other").unwrap();
        assert_eq!(read(&dir, "k.cubin").unwrap(), b"other");

        let path = dir.join("k.cubin");
        write(&dir, "k.cubin", &content).unwrap();
        let whole = fs::read(&path).unwrap();
        for len in [0, 10, HASH, whole.len() - 1] {
            fs::write(&path, &whole[..len]).unwrap();
            assert_eq!(read(&dir, "k.cubin"), None, "cut to {len}");
        }
        let mut flipped = whole.clone();
        flipped[HASH + 100] ^= 1;
        fs::write(&path, flipped).unwrap();
        assert_eq!(read(&dir, "k.cubin"), None, "a flipped bit");
    }

    #[cfg(unix)]
    #[test]
    fn only_the_owner_may_look_into_the_folder() {
        use std::os::unix::fs::PermissionsExt;
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("cache");
        write(&dir, "k", b"x").unwrap();
        assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);
    }

    #[test]
    fn writers_at_once_leave_one_whole_file() {
        let dir = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for writer in 0..4u8 {
                let dir = dir.path();
                scope.spawn(move || {
                    for _ in 0..20 {
                        write(dir, "k", &vec![writer; 100_000]).unwrap();
                        let seen = read(dir, "k").expect("whole at any time");
                        assert!(seen.len() == 100_000 && seen.iter().all(|&b| b == seen[0]));
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file stays");
    }
}
