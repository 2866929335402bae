"""The operators that the QNN execution provider has builders for, and what the builders ask."""

from __future__ import annotations

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
CONTROL_FLOW = ("If", "Loop", "Scan", "SequenceMap")
DOMAINS = ("", "com.microsoft")
# Of com.microsoft; everything else is the default domain's.
CONTRIB = ("QuantizeLinear", "DequantizeLinear", "Gelu", "QuickGelu", "FusedMatMul", "MatMulNBits", "RotaryEmbedding",
           "Inverse")
_BUILDERS = """
    Abs Add And ArgMax ArgMin Asin Atan AveragePool BatchNormalization Cast Ceil Clip Concat Conv ConvTranspose Cos
    CumSum DepthToSpace DequantizeLinear Div Einsum Elu Equal Exp Expand Flatten Floor GRU Gather GatherElements
    GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HardSigmoid
    HardSwish Identity InstanceNormalization IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual Log
    LogSoftmax LpNormalization MatMul Max MaxPool Mean Min Mod Mul Neg NonZero Not Or PRelu Pad Pow QuantizeLinear
    RMSNormalization RandomNormalLike RandomUniformLike Reciprocal ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd
    ReduceSum Relu Reshape Resize RoiAlign RotaryEmbedding Round STFT ScatterElements ScatterND Selu Sigmoid Sign Sin
    Slice Softmax Softplus SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose
    Unsqueeze Upsample Where Xor
"""
DEFAULT = frozenset(_BUILDERS.split())
# Dropped from the graph when their input's and output's quantizers are the same, computed in float when not.
MOVERS = frozenset(["Gather", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"])
# Between a node and its QuantizeLinear they are part of the node: the quantizer cuts off what they would.
TAILS = ("Relu", "Clip")
# Operator → which of its inputs is a weight.
WEIGHT_INPUT = {"MatMul": 1, "Gemm": 1, "Conv": 1, "ConvTranspose": 1}
# Operators whose other inputs are shapes, indices or bounds.
_WITH_PARAMETERS = """
    Reshape Slice Split Squeeze Unsqueeze Expand Tile Pad Clip ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd
    ReduceL2 Resize Upsample CumSum TopK Gather GatherElements GatherND
"""
FIRST_INPUT_ONLY = frozenset(_WITH_PARAMETERS.split())
# Operator → attribute → the values its builder takes.
ATTRIBUTES: dict[str, dict[str, tuple[int, ...]]] = {
    "LpNormalization": {"p": (2,), "axis": (-1,)},
    "RMSNormalization": {"axis": (-1,)},
}
# Operator → the first opset of the default domain that has it.
SINCE = {"RMSNormalization": 23, "RotaryEmbedding": 23, "Gelu": 20}
WIDE_TYPES_SINCE = 21  # 16-bit and 4-bit quantizers in the default domain
# Bits of a weight in blocks → what the block's size must be a multiple of.
BLOCK_MULTIPLES = {2: 16, 4: 8, 8: 4}
