"""ad hoc research runner: python rr.py specs.jsonl out.csv worker nworkers"""
import sys, json, time, csv, os, fcntl, math
sys.path.insert(0,'/work/main')
import torch; torch.set_num_threads(1)
import warnings; warnings.filterwarnings('ignore')
from benchmarks.quality import tasks
from benchmarks.quality.variants import inject_variant, VariantLinear
from genlora_lightning.analysis import effective_rank
TASKS={}
def lora(base, r, alpha=2.0, plus=1.0, seed=0, rs=False):
    return inject_variant(base, dict(R=r, a={'dense':'train'}, b={'dense':'train'}, alpha=alpha*(math.sqrt(r) if not rs else 1), scaling='rank' if False else 'sqrt', lr_a=1.0), seed)
def run(spec):
    t=TASKS.setdefault(spec['task'], None) or TASKS.__setitem__(spec['task'], tasks.make_task(spec['task'])) or TASKS[spec['task']]
    seed=spec['seed']; steps=spec.get('steps',300)
    torch.manual_seed(seed)
    m=t.build(seed, full=spec.get('full',False))
    groups=[]
    t0=time.time()
    if spec.get('full'): groups=[{'params':list(m.base.parameters()),'factor':1.0}]
    elif 'v' in spec: groups=inject_variant(m.base, spec['v'], seed)
    n=sum(p.numel() for g in groups for p in g['params'])
    lr=spec['lr']
    pg=[{'params':g['params'],'lr':lr*g['factor'],'base':lr*g['factor']} for g in groups]+[{'params':list(m.head.parameters()),'lr':t.head_lr,'base':t.head_lr}]
    opt=torch.optim.AdamW(pg,weight_decay=spec.get('wd',0.0),fused=True)
    losses=[]
    warm=max(1,int(.06*steps))
    for i,b in enumerate(t.batches(seed,steps)):
        f=(i+1)/warm if i<warm else (steps-i)/(steps-warm)
        for g in opt.param_groups: g['lr']=g['base']*f
        with torch.autocast('cpu',torch.bfloat16,enabled=bool(spec.get('full'))):
            l=t.loss(m,b)
        l.backward(); opt.step(); opt.zero_grad(set_to_none=True)
        losses.append(l.item())
    ts=time.time()-t0
    ev=t.evaluate(m,'val')
    er=[]
    for mod in m.base.modules():
        if isinstance(mod,VariantLinear):
            er.append(float(effective_rank(mod.A().detach(), mod.B().T.detach())))
    k=steps//3
    return dict(train=sum(losses[-k:])/k, val=ev['loss'], acc=ev['accuracy'], er=sum(er)/len(er) if er else 0, params=n, sec=ts, tot=time.time()-t0)
def done(out):
    d=set()
    if os.path.exists(out):
        for line in open(out): d.add(json.loads(line)['key'])
    return d
specs=[json.loads(l) for l in open(sys.argv[1])]
out=sys.argv[2]; w=int(sys.argv[3]); nw=int(sys.argv[4])
d=done(out)
for i,s in enumerate(specs):
    if i%nw!=w: continue
    key=json.dumps(s,sort_keys=True)
    if key in d: continue
    r=run(s); r['key']=key
    with open(out,'a') as f:
        fcntl.flock(f,fcntl.LOCK_EX); f.write(json.dumps(r)+'\n')
