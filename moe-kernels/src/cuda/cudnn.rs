//! cuDNN: graphs of operations, a plan for each, asked for once.
//!
//! The library is told what is to be computed by descriptions: of tensors, of operations between them, of a graph of operations. Its
//! heuristics name engines for the graph, the best first, and the first of them that makes a plan is taken (and gives the same bits each
//! time, where that is promised): which it is depends on the graph, the GPU and the library alone.
//! [`cudnn_graph`](super::cudnn_graph) puts graphs together.

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::cudnn::sys::{
    self, cudnnBackendAttributeName_t as Name, cudnnBackendAttributeType_t as Type, cudnnBackendDescriptor_t,
    cudnnBackendDescriptorType_t as Kind, cudnnBackendHeurMode_t as Heuristics, cudnnBackendNumericalNote_t,
    cudnnDataType_t, cudnnHandle_t, cudnnPointwiseMode_t, cudnnReduceTensorOp_t, cudnnStatus_t,
};

use super::Cuda;
use super::attention_graph::Problem;
use super::library::Library;
use crate::{Device, Error, Result};

/// The oldest version whose attention is used, as `cudnnGetVersion` counts.
const VERSION: usize = 91_400;
/// Problems whose plans are remembered; then all are forgotten, which costs the time of making them again.
const PLANS: usize = 256;

/// The library on one device, with the plans asked for so far.
pub(super) struct Dnn {
    version: usize,
    state: Mutex<State>,
}

struct State {
    handle: cudnnHandle_t,
    /// `None` where the library has no plan.
    plans: HashMap<Problem, Option<Arc<Plan>>>,
}

// SAFETY: the library's handle may be used on any thread, by one at a time; plans are used only together with it.
unsafe impl Send for Dnn {}
// SAFETY: as above: all is behind a lock.
unsafe impl Sync for Dnn {}

impl Dnn {
    /// On the device whose context is current, for work on `stream`.
    pub(super) fn new(stream: sys::cudaStream_t) -> Result<Self> {
        Library::Cudnn.require()?;
        // Without it cuDNN ends the process.
        Library::CublasLt.require()?;
        // SAFETY: the library is there.
        let version = unsafe { sys::cudnnGetVersion() };
        if version < VERSION {
            let what = format!("cuDNN {}; 9.14 or later is needed ({})", text(version), Library::Cudnn.fix());
            return Err(Error::Unsupported { what });
        }
        let mut handle = ptr::null_mut();
        // SAFETY: the pointer is valid for writing.
        check("cudnnCreate", unsafe { sys::cudnnCreate(&mut handle) })?;
        let dnn = Dnn { version, state: Mutex::new(State { handle, plans: HashMap::new() }) };
        // SAFETY: handle and stream are alive.
        check("cudnnSetStream", unsafe { sys::cudnnSetStream(handle, stream) })?;
        Ok(dnn)
    }

    /// As in `9.19.0`.
    pub(super) fn version(&self) -> String {
        text(self.version)
    }

    /// The plan for a problem; `None` where the library supports none. Whatever else is in its way is an error, and may be gone the next
    /// time. The context is current.
    pub(super) fn plan(&self, problem: &Problem) -> Result<Option<Arc<Plan>>> {
        if !problem.is_right(self.version) {
            return Ok(None);
        }
        // The map is whole after every statement: a panic elsewhere harms nothing.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = state.plans.get(problem) {
            return Ok(plan.clone());
        }
        let plan = problem.graph().and_then(|graph| graph.plan(state.handle, problem.must_repeat()));
        let plan = if_supported(plan)?.flatten().map(Arc::new);
        if state.plans.len() >= PLANS {
            state.plans.clear();
        }
        state.plans.insert(*problem, plan.clone());
        Ok(plan)
    }

    /// Puts a plan on the stream.
    ///
    /// # Safety
    ///
    /// `operands` are all those of the plan's graph, by number, of its shapes and strides: addresses on the device, and of numbers that
    /// are passed by value on the host.
    unsafe fn execute(&self, plan: &Plan, operands: &[(i64, Address)], workspace: Address) -> Result<()> {
        let (ids, addresses): (Vec<i64>, Vec<Address>) = operands.iter().copied().unzip();
        let pack = Description::new(Kind::CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR)?
            .set(Name::CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, &ids)?
            .set(Name::CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, &addresses)?
            .set(Name::CUDNN_ATTR_VARIANT_PACK_WORKSPACE, &[workspace])?
            .finalize()?;
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: plan and pack are finalized; what they point at is as the caller says.
        check("cudnnBackendExecute", unsafe { sys::cudnnBackendExecute(state.handle, plan.plan.0, pack.0) })
    }
}

impl Drop for Dnn {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.plans.clear();
        // SAFETY: it was created, and is destroyed once.
        unsafe { sys::cudnnDestroy(state.handle) };
    }
}

impl Cuda {
    /// Puts a plan on the stream, with a workspace of its own.
    ///
    /// # Safety
    ///
    /// As of [`Dnn::execute`].
    pub(super) unsafe fn execute(&self, plan: &Plan, operands: &[(i64, Address)]) -> Result<()> {
        // Given back at the end, and used again by whatever comes later on the stream.
        let workspace = self.alloc(plan.workspace)?;
        // SAFETY: the caller's; the workspace is as large as the plan says.
        unsafe { self.cudnn()?.execute(plan, operands, Address(workspace.address() as *mut c_void)) }
    }
}

/// How a graph is computed.
pub(super) struct Plan {
    plan: Description,
    workspace: usize,
    /// What the plan was made of.
    _parts: Vec<Description>,
}

impl Plan {
    /// By the first engine that the heuristics name and that takes the graph, with the same bits each time if it `must_repeat`; `None`
    /// if there is none.
    pub(super) fn new(
        handle: cudnnHandle_t,
        graph: Description,
        mut parts: Vec<Description>,
        must_repeat: bool,
    ) -> Result<Option<Self>> {
        let heuristics = Description::new(Kind::CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR)?
            .set(Name::CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, &[graph.part()])?
            .set(Name::CUDNN_ATTR_ENGINEHEUR_MODE, &[Heuristics::CUDNN_HEUR_MODE_A])?
            .finalize()?;
        let configurations = heuristics.engines()?;
        parts.extend([graph, heuristics]);
        for configuration in configurations {
            if must_repeat && !configuration.repeats()? {
                continue;
            }
            let plan = Description::new(Kind::CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR)?
                .set(Name::CUDNN_ATTR_EXECUTION_PLAN_HANDLE, &[handle])?
                .set(Name::CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, &[configuration.part()])?
                .finalize();
            parts.push(configuration);
            if let Some(plan) = if_supported(plan)? {
                let workspace = plan.size(Name::CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE)?;
                return Ok(Some(Plan { plan, workspace, _parts: parts }));
            }
        }
        Ok(None)
    }
}

/// A description that the library holds.
pub(super) struct Description(cudnnBackendDescriptor_t);

/// A [`Description`] inside others, which has to live as long as they do.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Part(cudnnBackendDescriptor_t);

/// Where an operand lies.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Address(pub(super) *mut c_void);

/// What the library remarks on the numbers of an engine; later versions may know more remarks than the bindings.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
struct NumericalNote(u32);

impl NumericalNote {
    const NONDETERMINISTIC: Self =
        NumericalNote(cudnnBackendNumericalNote_t::CUDNN_NUMERICAL_NOTE_NONDETERMINISTIC as u32);
    /// More than any version has.
    const MOST: usize = 64;
}

/// What attributes are made of.
///
/// # Safety
///
/// The library reads a `TYPE` as it lies in memory.
pub(super) unsafe trait Attribute: Copy {
    const TYPE: Type;
}

macro_rules! attributes {
    ($($t:ty = $name:ident;)*) => {$(
        // SAFETY: that is the library's own type, or one that it reads in the same way.
        unsafe impl Attribute for $t {
            const TYPE: Type = Type::$name;
        }
    )*};
}
attributes! {
    i64 = CUDNN_TYPE_INT64;
    bool = CUDNN_TYPE_BOOLEAN;
    Part = CUDNN_TYPE_BACKEND_DESCRIPTOR;
    Address = CUDNN_TYPE_VOID_PTR;
    NumericalNote = CUDNN_TYPE_NUMERICAL_NOTE;
    Heuristics = CUDNN_TYPE_HEUR_MODE;
    cudnnHandle_t = CUDNN_TYPE_HANDLE;
    cudnnDataType_t = CUDNN_TYPE_DATA_TYPE;
    cudnnPointwiseMode_t = CUDNN_TYPE_POINTWISE_MODE;
    cudnnReduceTensorOp_t = CUDNN_TYPE_REDUCTION_OPERATOR_TYPE;
}

impl Description {
    pub(super) fn new(kind: Kind) -> Result<Self> {
        let mut description = ptr::null_mut();
        // SAFETY: the library is there; the pointer is valid for writing.
        check("cudnnBackendCreateDescriptor", unsafe {
            sys::cudnnBackendCreateDescriptor(kind, &mut description)
        })?;
        Ok(Description(description))
    }

    pub(super) fn set<A: Attribute>(self, name: Name, values: &[A]) -> Result<Self> {
        // SAFETY: there are so many values, of the type that is named.
        check("cudnnBackendSetAttribute", unsafe {
            sys::cudnnBackendSetAttribute(self.0, name, A::TYPE, values.len() as i64, values.as_ptr().cast())
        })?;
        Ok(self)
    }

    /// Ready for use, and not to be changed any more.
    pub(super) fn finalize(self) -> Result<Self> {
        // SAFETY: it was created.
        check("cudnnBackendFinalize", unsafe { sys::cudnnBackendFinalize(self.0) })?;
        Ok(self)
    }

    pub(super) fn part(&self) -> Part {
        Part(self.0)
    }

    /// A size.
    fn size(&self, name: Name) -> Result<usize> {
        let mut value = [0i64];
        self.get(name, &mut value)?;
        usize::try_from(value[0]).map_err(|_| Error::Driver {
            call: "cudnnBackendGetAttribute",
            code: 0,
            reason: format!("{name:?} is {}", value[0]),
        })
    }

    /// What the heuristics have found, the best first.
    fn engines(&self) -> Result<Vec<Description>> {
        const NAME: Name = Name::CUDNN_ATTR_ENGINEHEUR_RESULTS;
        let count = self.get::<Part>(NAME, &mut [])?;
        let engine = |_| Description::new(Kind::CUDNN_BACKEND_ENGINECFG_DESCRIPTOR);
        let mut engines = (0..count).map(engine).collect::<Result<Vec<_>>>()?;
        let mut parts: Vec<Part> = engines.iter().map(Description::part).collect();
        let written = self.get(NAME, &mut parts)?;
        engines.truncate(written);
        Ok(engines)
    }

    /// Whether the engine of a configuration gives the same bits each time.
    fn repeats(&self) -> Result<bool> {
        let engine = Description::new(Kind::CUDNN_BACKEND_ENGINE_DESCRIPTOR)?;
        self.get(Name::CUDNN_ATTR_ENGINECFG_ENGINE, &mut [engine.part()])?;
        let mut notes = [NumericalNote(u32::MAX); NumericalNote::MOST];
        engine.get(Name::CUDNN_ATTR_ENGINE_NUMERICAL_NOTE, &mut notes)?;
        Ok(!notes.contains(&NumericalNote::NONDETERMINISTIC))
    }

    /// Writes as many as there is room for, and returns how many there are.
    fn get<A: Attribute>(&self, name: Name, values: &mut [A]) -> Result<usize> {
        let mut count = 0;
        let to = if values.is_empty() { ptr::null_mut() } else { values.as_mut_ptr().cast() };
        // SAFETY: there is room for so many values, of the type that is named.
        check("cudnnBackendGetAttribute", unsafe {
            sys::cudnnBackendGetAttribute(self.0, name, A::TYPE, values.len() as i64, &mut count, to)
        })?;
        Ok(usize::try_from(count).unwrap_or(0))
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: it was created, and is destroyed once.
        unsafe { sys::cudnnBackendDestroyDescriptor(self.0) };
    }
}

fn text(version: usize) -> String {
    format!("{}.{}.{}", version / 10_000, version % 10_000 / 100, version % 100)
}

/// `None` where the library does not support what it was asked for, by any of its codes for that.
fn if_supported<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        // The last three digits say what exactly.
        Err(Error::Driver { code, .. })
            if code / 1000 * 1000 == cudnnStatus_t::CUDNN_STATUS_NOT_SUPPORTED as i32 =>
        {
            Ok(None)
        }
        result => result.map(Some),
    }
}

fn check(call: &'static str, status: cudnnStatus_t) -> Result<()> {
    if status == cudnnStatus_t::CUDNN_STATUS_SUCCESS {
        return Ok(());
    }
    Err(Error::Driver { call, code: status as i32, reason: format!("{status:?}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_supported_is_no_error() {
        use cudnnStatus_t::*;
        let result = |status| if_supported(check("cudnnBackendFinalize", status));
        assert_eq!(result(CUDNN_STATUS_SUCCESS), Ok(Some(())));
        for status in [
            CUDNN_STATUS_NOT_SUPPORTED,
            CUDNN_STATUS_NOT_SUPPORTED_GRAPH_PATTERN,
            CUDNN_STATUS_NOT_SUPPORTED_CUDA_GRAPH_NATIVE_API,
        ] {
            assert_eq!(result(status), Ok(None), "{status:?}");
        }
        for status in [
            CUDNN_STATUS_NOT_INITIALIZED,
            CUDNN_STATUS_BAD_PARAM_SHAPE_MISMATCH,
            CUDNN_STATUS_INTERNAL_ERROR,
            CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED,
            CUDNN_STATUS_EXECUTION_FAILED_CUDA_DRIVER,
        ] {
            let error = result(status).expect_err("an error");
            assert!(matches!(error, Error::Driver { code, .. } if code == status as i32), "{error}");
        }
        let other = Error::OutOfMemory { requested: 3000, live: 0 };
        assert_eq!(if_supported::<()>(Err(other.clone())), Err(other));
    }
}
