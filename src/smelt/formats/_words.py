"""The dictionary of the deflated meta: what files would otherwise say again and again.

Part of version 1 of the format: a change needs another version.  The likeliest stands last.
"""

WORDS = (
    b'"u16""u32""u64""i16""i32""f64""c64""f8e4m3fn""f8e5m2""model.embed_tokens.weight","model.layers.0.self_attn.q_p'
    b'roj.weight","k_proj.v_proj.o_proj.mlp.gate_proj.up_proj.down_proj.input_layernorm.weight","post_attention_laye'
    b'rnorm.weight","model.norm.weight","lm_head.weight","bf16""transformer.wte.wpe.h.0.ln_1.attn.c_attn.c_proj.mlp.'
    b"c_fc.ln_f.encoder.layer.0.attention.self.query.key.value.output.dense.embeddings.word_embeddings.position_embe"
    b'ddings.LayerNorm.intermediate.in_proj_weight","in_proj_bias","out_proj.linear1.norm1.features.0.classifier.1.b'
    b'ackbone.blocks.0.head.weight_ih_l0","weight_hh_l0","bias_ih_l0","bias_hh_l0","factors",{},"left",[],"right",[]'
    b',"hashed",{},"binary",{},"signs","float",{},"f16","residual","low","base","edits":[["keep","conv1.weight",0,"0'
    b'-9,11"],["set","conv1","out_channels",],["set","conv2","in_channels",["set","bn1","num_features",["set","fc1",'
    b'"out_features",],["set","fc2","in_features",["replace","fc1","chain",{"layers":[["Linear",{"in_features":,"out'
    b'_features":,"bias":false}],["Conv2d",{"in_channels":,"out_channels":,"kernel_size":[3,3],"stride":[1,1],"paddi'
    b'ng":[1,1],["remove","bn1"],["tie","activations":[["fc1","input","quantize.affine",{},["scale",[],"zero",[]],["'
    b'scale"]],["conv1","output","recipe":{"steps":[{"prune.channels":{"ratio":0.3,"score":"taylor"}},{"lowrank.svd"'
    b':{"rank":}},{"prune.weights":{"ratio":0.9,"scope":"global"}},{"train":{"epochs":10,"lr":0.001,"optimizer":"sgd'
    b'","with":[{"distill.logits":{"temperature":4,"alpha":0.7}},{"prune.weights":{"ratio":{"ramp":[0,0.9]}}},{"quan'
    b'tize.affine":{"bits":4,"on":"*.weight"}}]}},{"share.kmeans":{"clusters":16,"on":"fc*"}},{"train":{"epochs":2,"'
    b'lr":0.0001}},{"quantize.affine":{"bits":8,"on":"*.bias"}},{"code.bits":{}},{"code.entropy":{}}]},"report":[[0,'
    b'"checkpoint",[0,"latency",[0,"loss",[0,"macs",2],[0,"parameters",2],[0,"accuracy",0.98],[0,"bytes",1],[1,"accu'
    b'racy",0.97]]"layer1.0.downsample.0.weight",["affine",{"axis":0,"bits":4,"group":64,"symmetric":false},[64],"co'
    b'des",["bits",{"bits":4,"offset":-7},"i8","packed",72],"scale",[64],"zero","layer1.0.bn1.weight",["entropy",{},'
    b'[64],"stream",8],"layer1.0.bn1.bias",[64],"layer1.0.bn1.running_mean",[64],"layer1.0.bn1.running_var",[64],"la'
    b'yer1.0.bn1.num_batches_tracked","i64","stages.0.0.conv1.weight",[64,3,3],"shortcut.0.weight",[64,1,1],"mask",['
    b'"bits",{},"bool","packed",{"builder":"resnet_digits","arguments":{"classes":10,"channels":[],"size":8,"kernel"'
    b':3,"padding":1},{"builder":"lenet","tensors":["conv1.weight",["affine",{"axis":0,"bits":8},[],"codes",["entrop'
    b'y",{},"i8","stream",1],"scale",[20]],"conv1.bias",[20],"conv2.weight",{"builder":"lenet300","tensors":["fc1.we'
    b'ight",["sparse",{"packed":true,"gap":63,"columns":true},[300,784],"positions",["entropy",{},1,"stream",1],"val'
    b'ues",["codebook",{},null,"codebook",[16],"indices",["entropy",{},1,"stream",1]]],"fc1.bias",["affine",{},[100]'
    b',"codes","i8","scale",[]],"fc2.weight",["sparse",{"packed":true,"gap":15},['
)
