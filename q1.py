import torch, copy, time, numpy as np, sys
from scipy.stats import spearmanr
from resnet_bk.data import LMData
from resnet_bk.learner import Learner, lm_loss
from resnet_bk.model import *
from resnet_bk import pruning as P
torch.set_num_threads(1)
data=LMData.from_corpus('tinyshakespeare', batch_size=16, context=64)
torch.manual_seed(0)
m=ResNetBK(ModelConfig(data.vocab_size,32,2,mixer='resolvent',ffn='mlp',ffn_kw=dict(mult=2)))
t=time.time(); Learner(m,data,lr=1e-2,eval_every=0,progress=False).fit(steps=300); print('train',time.time()-t)
B=[data.train.batch(0,i) for i in range(6)]; V=[data.valid.batch(0,i) for i in range(12)]
@torch.no_grad()
def loss(m): return np.mean([lm_loss(m(x),y).item() for x,y in V])
base=loss(m); print(base)
brute={}
for n,u in P.prunable(m).items():
    C=u.count; d=[]
    for c in range(C):
        p=copy.deepcopy(m); k={n:[i for i in range(C) if i!=c]}
        P.prune(p,k,energy=P.measure_energy(m,k,B[:1])); d.append(loss(p)-base)
    brute[n]=np.array(d)
def abs_(model,b,kind):
    units=P.prunable(model); ps=[getattr(u.pieces()[-1].module,u.pieces()[-1].name) for u in units.values()]
    S=[0]*len(ps); n=0
    model.eval()
    for X,Y in b:
        for x,y in (zip(X.split(1),Y.split(1)) if kind!='batch' else [(X,Y)]):
            gs=torch.autograd.grad(lm_loss(model(x),y),ps)
            for i,(u,p,g) in enumerate(zip(units.values(),ps,gs)):
                d=P._dot(u,p.detach(),g); S[i]=S[i]+(d.abs() if kind=='abs' else d if kind=='signed' else d.square()); n+=i==0
    return {k:(s.abs()/n) for k,s in zip(units,S)}
for how,imp in dict(magnitude=P.importance(m,how='magnitude'),activation=P.importance(m,B,'activation'),fisher=P.importance(m,B),abs=abs_(m,B,'abs'),signed=abs_(m,B,'signed'),batch=abs_(m,B,'batch')).items():
    r=[spearmanr(imp[n].detach(),brute[n])[0] for n in brute]
    print(how,[f'{x:.2f}' for x in r],'all raw',round(spearmanr(np.concatenate([imp[n].detach().numpy() for n in brute]),np.concatenate(list(brute.values())))[0],3),'scaled',round(spearmanr(np.concatenate([(imp[n]/imp[n].mean()).detach().numpy() for n in brute]),np.concatenate(list(brute.values())))[0],3))
print([f'{b.mean():.1e} {b.max():.1e}' for b in brute.values()])
print('one shot: loss by share')
for how in ('magnitude','activation','taylor'):
  for scale in (True,False):
    imp=P.importance(m,B,how); row=[]
    for share in (.9,.75,.5,.35):
        k=P.choose(imp,share,scale=scale)
        r=[]
        for e in ('share',P.measure_energy(m,k,B)):
            p=copy.deepcopy(m); P.prune(p,k,energy=e); r.append(f'{loss(p)-base:.3f}')
        row.append('/'.join(r))
    print(how,scale,row,[len(i) for i in k.values()])
